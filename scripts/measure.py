"""supernet-measure: the latency of every operation of a space on a target, as a JSON table."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from latency.measure import measure
from latency.table import LatencyTable
from supernet_scripts.common import command, make_space
from supernet_scripts.measured import Measured
from supernet_scripts.measuring import check_table, measure_space

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="measure")
@command
def main(cfg: DictConfig) -> None:
    output = Path(cfg.output)
    if cfg.merge:
        tables = [LatencyTable.load(path) for path in cfg.merge]
        table = tables[0]
        for other in tables[1:]:
            table = table.merge(other)
        table.save(output)
    else:
        data = instantiate(cfg.data)
        space = make_space(cfg, data)
        check_table(space)
        table = _measure(measure_space(cfg, data, space, with_table=False), output)
    print(f"{len(table.measurements)} operations in {output}")


def _measure(measured: Measured, output: Path) -> LatencyTable:
    """Complete the table in `output`, or make it."""
    table = LatencyTable.load(output) if output.exists() else None
    sites = measured.needed
    if table is not None:
        here = measured.is_here
        name = measured.backend.describe()["device_name"] if here else None
        table.check_target(measured.target, name)
        missing = set(table.missing(site.key for site in sites))
        sites = [site for site in sites if site.key in missing]
        if not sites:
            log.info(
                "%s has every operation of the space already; output=ANOTHER measures anew", output
            )
            return table
    journal = output.with_name(f"{output.name}.progress")
    fresh = measure(sites, measured.backend, measured.target, measured.plan, journal)
    table = fresh if table is None else table.merge(fresh)
    table.save(output)
    return table


if __name__ == "__main__":
    main()
