"""From configuration to a space with its latency table, read or measured, and its calibration."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from latency.backends.base import Backend
from latency.backends.bundle import Bundle
from latency.measure import cached_table, keep
from latency.runner import Plan
from latency.sites import trace, trace_compiled
from latency.table import Calibration, LatencyTable, Target
from latency.validate import calibrate, describe, draw
from supernet.data import Data
from supernet.mixed_ops.base import MixedOp
from supernet.space import SearchSpace
from supernet_scripts.common import merged, plain
from supernet_scripts.measured import Measured, compiles, input_shape

log = logging.getLogger(__name__)


def measure_space(cfg: DictConfig, data: Data, space: SearchSpace, with_table: bool) -> Measured:
    """Trace the space for `latency.target`; read its table, or measure and cache it.

    Raises:
        ValueError: the table given is for another target, or lacks operations, or costs of the
            space are not additive, so that no table says what networks of it take.
    """
    backend = make_backend(cfg)
    target = make_target(cfg, backend, data)
    classes, shape = data.info.num_classes, input_shape(space, target)
    if not space.additive:
        if cfg.latency.table is not None:
            check_table(space)
        return Measured([], [], classes, backend, target, *make_plans(cfg))
    supernet = space.build(MixedOp, classes, search=False)  # as it is deployed
    sites = [
        site
        for site in trace(supernet, space.choices, shape)
        if (site.choice, site.option) not in space.excluded
    ]
    given = None
    if with_table and cfg.latency.table is not None:
        given = LatencyTable.load(cfg.latency.table)
    compiled = trace_compiled(space, classes, shape) if compiles(backend, given) else []
    measured = Measured(sites, compiled, classes, backend, target, *make_plans(cfg))
    if not with_table:
        return measured
    latency = cfg.latency
    if given is None:
        measured.table, path, fresh = cached_table(
            measured.needed, backend, target, measured.plan, latency.cache_dir
        )
        measured.cached = path
        log.info("latency table %s: %s", "measured" if fresh else "from the cache", path)
    else:
        if not latency.allow_other_target:
            name = backend.describe()["device_name"] if measured.is_here else None
            given.check_target(target, name)
        keys = {site.key for site in measured.needed}
        given.require(keys, measure_command())
        measured.table = given.restrict(keys)
    return measured


def check_table(space: SearchSpace) -> None:
    """Refuse a space that can have no latency table.

    Raises:
        ValueError: its costs are not additive.
    """
    if not space.additive:
        raise ValueError(
            f"{space.id} has no latency table: a layer's cost depends on several choices at once, "
            "so that its operations cannot be listed; a search with a cost or limit of latency "
            "measures whole networks as it comes upon them"
        )


def make_backend(cfg: DictConfig) -> Backend:
    """The configured one, or for `import` the bundle that the result is of."""
    backend = cfg.backend
    if result := cfg.get("import"):
        path = f"{Bundle.__module__}.{Bundle.__qualname__}"
        own = backend if backend["_target_"] == path else {"_target_": path}
        backend = {**own, "result": result}
    found: Backend = instantiate(backend)
    return found


def make_plans(cfg: DictConfig) -> tuple[Plan, Plan]:
    """Of measuring operations, and whole networks."""
    names = ("rounds", "min_rounds", "warmup", "burst_ms", "precision", "time_limit_s")
    plan = Plan(**{name: cfg.latency[name] for name in names})
    own = {"rounds": cfg.latency.network_rounds, "precision": cfg.latency.network_precision}
    return plan, replace(plan, **own)


def validate(cfg: DictConfig, measured: Measured, space: SearchSpace) -> Calibration:
    """Measure whole networks and put the calibration they give into the table."""
    assert measured.table is not None
    fitted, held_out = draw(
        space, measured.sites, cfg.latency.num_fit, cfg.latency.num_held_out, cfg.seed
    )
    drawn = [*fitted, *held_out]
    networks = measured.networks(space, drawn)
    sites = [measured.sites_of(space, architecture) for architecture in drawn]
    return calibrate(space, measured.table, drawn, sites, networks, len(fitted))


def validate_if_new(cfg: DictConfig, measured: Measured, space: SearchSpace) -> None:
    """Calibrate a table that was never validated for this space, where the device is at hand."""
    table = measured.table
    wanted = cfg.latency.num_fit and measured.is_here
    if table is None or not wanted or table.calibration(space.id, space.settings) is not None:
        return
    found = validate(cfg, measured, space)
    log.info("%s", describe(found))
    if measured.cached is not None:
        keep(measured.cached, table)


def warn_unvalidated(measured: Measured, space: SearchSpace) -> None:
    """Sums of separately timed operations can be far from whole networks."""
    if measured.table and measured.table.calibration(space.id, space.settings) is None:
        log.warning(
            "the latency table was never validated for this space: predicted latencies are plain "
            "sums of operations; supernet-validate measures whole networks and calibrates it"
        )


def measure_run(
    run_cfg: DictConfig, run: Path, data: Data, space: SearchSpace, main: bool = True
) -> Measured:
    """The same for a finished run, with what was measured in its folder.

    Args:
        main: whether this process measures.
    """
    path = run / "latency_table.json"
    if not space.additive:
        measured = measure_space(run_cfg, data, space, with_table=False)
        if needs_table(run_cfg):
            measured.measure_whole(space, run, main)
        return measured
    own = {"table": str(path), "allow_other_target": True}
    cfg = merged(run_cfg, {"latency": own})
    needed = needs_table(run_cfg) or path.exists()
    return measure_space(cfg, data, space, with_table=needed)


def needs_table(cfg: DictConfig) -> bool:
    """Whether a cost or a limit is read from the table, or one is given all the same."""
    limits = cfg.objective.get("limits", {})
    limited = {name for name, upper in limits.items() if upper is not None}
    return bool({cfg.objective.cost, *limited} & {"latency", "energy"} or cfg.latency.table)


def make_target(cfg: DictConfig, backend: Backend, data: Data) -> Target:
    wanted = {k: v for k, v in plain(cfg.latency.target).items() if v is not None}
    own = {
        "device": backend.device,
        "runtime": backend.runtime,
        "resolution": data.info.img_size,
    }
    return Target(**{**own, **wanted})


def measure_command() -> str:
    """The measuring command of the present configuration."""
    if not HydraConfig.initialized():  # before the jobs of a sweep
        return "supernet-measure output=FILE"
    shared = ("space", "exclude", "data", "backend", "latency", "experiment")
    words = [
        override
        for override in HydraConfig.get().overrides.task
        if override.lstrip("+~").startswith(shared) and not override.startswith("latency.table")
    ]
    return shlex.join(["supernet-measure", *words, "output=FILE"])
