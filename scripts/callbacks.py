"""Before and after a multirun: measure each latency table once, compare the jobs.

A sweep of nothing but seeds asks how good a search is, so each job has its random-search baseline.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, read_write

from supernet.report import write_comparison
from supernet.report.progress import write_progress
from supernet_scripts.common import make_space
from supernet_scripts.measuring import measure_space, needs_table, validate_if_new

log = logging.getLogger(__name__)

MEASURED_BY = ("space", "exclude", "data", "backend", "latency", "experiment")


class MultirunCallback(Callback):
    """Jobs find their table in the cache: none measures while another trains."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = list(config.hydra.overrides.task)
        with read_write(config):
            config.hydra.overrides.task = with_baseline(given)
        for overrides in table_overrides(list(config.hydra.overrides.task)):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            cfg = hydra.compose_config(
                config_name=config.hydra.job.config_name,
                overrides=overrides,
                run_mode=RunMode.RUN,
                with_log_configuration=False,
            )
            if needs_table(cfg) and cfg.latency.table is None:
                data = instantiate(cfg.data)
                space = make_space(cfg, data)
                if space.additive:
                    measured = measure_space(cfg, data, space, with_table=True)
                    validate_if_new(cfg, measured, space)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        print(write_comparison(folder))
        with suppress(ValueError):  # jobs that did not try architectures one by one
            print(f"best so far: {write_progress([folder], folder)[0]}")


def with_baseline(overrides: list[str]) -> list[str]:
    """A sweep's overrides; where it is over seeds alone, with the random-search baseline."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    given = {override.key_or_group: override.value() for override in parsed}
    if swept != {"seed"} or "search_baseline" in given or given.get("strategy") == "random":
        return overrides
    return [*overrides, "search_baseline=random"]


def table_overrides(overrides: list[str]) -> list[list[str]]:
    """The combinations of a sweep's overrides that may need a table each.

    Swept settings that do not touch a table are left at their first value; a range without end
    (of another sweeper) is left out, its jobs measure for themselves under the lock.
    """
    groups: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if not override.is_sweep_override():
            groups.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            values = _values(override)
            touches = override.key_or_group.startswith(MEASURED_BY)
            groups.append(values if touches else values[:1])
    return [list(combination) for combination in itertools.product(*groups)]


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
