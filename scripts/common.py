"""From configuration to objects, and the run folder: what the commands share."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from latency.backends.base import Backend
from latency.backends.bundle import Bundle
from latency.backends.torch_cpu import keep_freed_memory
from latency.measure import MeasuredNetwork, cached_table, keep, measure_networks
from latency.memory import PeakMemory
from latency.model import (
    AdditiveCost,
    LatencyModel,
    energy_cost,
    macs_cost,
    network_ms,
    params_cost,
)
from latency.runner import Plan
from latency.samples import Elsewhere
from latency.sites import Site, trace, trace_architecture, trace_compiled
from latency.table import Calibration, LatencyTable, Measurement, Target
from latency.validate import calibrate, describe, draw
from supernet.choice import Architecture
from supernet.data import Data
from supernet.derive import check_space
from supernet.engine import Diverged
from supernet.files import write_text
from supernet.limits import Limit
from supernet.mixed_ops.base import MixedOp
from supernet.network import Network, inherit_weights
from supernet.objective import Objective
from supernet.outcome import OnTarget
from supernet.space import SearchSpace

log = logging.getLogger(__name__)

FEW, NUM_COPIES = 4, 4  # up to so many networks are timed in so many copies each
NUM_ANCHORS = 8  # networks of the calibration that are measured beside others

UNSAVED = ("resume", "run_dir", "hydra")  # may differ when a run is resumed


def hide_other_ranks() -> None:
    """Under `accelerate launch` every process runs Hydra: only the first may write."""
    if int(os.environ.get("RANK", "0")) > 0:
        quiet = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
        folders = ["hydra.run.dir=.", "hydra.sweep.dir=.", "hydra.sweep.subdir=."]
        sys.argv += quiet + folders


def command(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """What is wrong with the input is said in one sentence; a bug keeps its traceback."""

    @functools.wraps(task)
    def wrapped(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except Elsewhere as steps:
            print(steps)
            return None
        except (ValueError, Diverged, InstantiationException) as error:
            cause = error.__cause__ if isinstance(error, InstantiationException) else error
            expected = isinstance(cause, ValueError | Diverged)
            sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
            if sweeps or not expected or "HYDRA_FULL_ERROR" in os.environ:
                raise
            raise SystemExit(f"{Path(sys.argv[0]).stem}: {cause}") from None

    return wrapped


def open_run(cfg: DictConfig, accelerator: Accelerator) -> Path:
    """Agree on the run folder and keep the resolved configuration in it.

    Raises:
        ValueError: the folder holds a run already, or on resuming another configuration.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder = Path(broadcast_object_list([str(folder)])[0])
    if accelerator.is_main_process:
        _check_folder(cfg, folder)
    accelerator.wait_for_everyone()
    return folder


def _check_folder(cfg: DictConfig, folder: Path) -> None:
    path = folder / "config.yaml"
    config = OmegaConf.create({k: v for k, v in plain(cfg).items() if k not in UNSAVED})
    if not _has_begun(folder):
        overrides = HydraConfig.get().overrides
        named = any("run_dir" in o or ".dir=" in o for o in [*overrides.task, *overrides.hydra])
        if cfg.resume and not named:
            raise ValueError("resume=true needs run_dir=FOLDER, the run to continue")
        if path.exists() and OmegaConf.load(path) != config:
            (folder / "latency_table.json").unlink(missing_ok=True)  # of another target, perhaps
        write_text(path, OmegaConf.to_yaml(config))
        return
    if not cfg.resume:
        raise ValueError(
            f"{folder} holds a run already: continue it with resume=true, or choose another run_dir"
        )
    saved, ours = flat(OmegaConf.load(path)), flat(config)
    if differ := sorted(k for k in {*saved, *ours} if saved.get(k) != ours.get(k)):
        raise ValueError(
            "a run is resumed with the configuration that it was started with; different: "
            + ", ".join(f"{k}={ours.get(k)} (was {saved.get(k)})" for k in differ)
        )


def _has_begun(folder: Path) -> bool:
    """Whether there is anything to resume: a refused or very short run leaves nothing."""
    marks = ("result.json", "checkpoint", "*/checkpoint")
    return any(any(folder.glob(mark)) for mark in marks)


def flat(config: Any) -> dict[str, Any]:
    """{dotted key: value} of a configuration."""
    if not OmegaConf.is_dict(config):
        return {"": OmegaConf.to_container(config) if OmegaConf.is_config(config) else config}
    return {
        f"{key}.{rest}".rstrip("."): value
        for key in config
        for rest, value in flat(config[key]).items()
    }


def set_up_cpu(cfg: DictConfig) -> None:
    """Threads of the training (a measurement has its own number), and memory that is not given
    back after every layer: page faults are a third of a supernet's step."""
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    if OmegaConf.select(cfg, "backend.keep_memory", default=True):  # False measures the faults
        keep_freed_memory()


def make_space(cfg: DictConfig, data: Data) -> SearchSpace:
    """The space, for the data's images unless it says otherwise, without excluded candidates."""
    shape = {"in_chans": data.info.in_chans, "img_size": data.info.img_size}
    space = instantiate({**shape, **cfg.space}, _convert_="all")
    assert isinstance(space, SearchSpace), space
    restrict(space, cfg)
    return space


def restrict(space: SearchSpace, cfg: DictConfig) -> None:
    """Do what `exclude` and `at_most` say; a run of before they could be said says nothing.

    Raises:
        ValueError: they name no candidate, or leave no architecture.
    """
    space.exclude(list(cfg.get("exclude", [])))
    space.at_most(list(cfg.get("at_most", [])))
    check_space(space)


def make_objective(cfg: DictConfig) -> Objective:
    objective = instantiate(cfg.objective, _convert_="all")
    assert isinstance(objective, Objective), objective
    return objective


@dataclass
class Measured:
    """A space seen from its target.

    Attributes:
        sites: of the supernet, without those of excluded candidates.
        compiled: what compiled networks run besides; empty where the runtime compiles no graphs.
        num_classes: of the networks.
        plan, network_plan: of measuring operations, and whole networks.
        cached: file that keeps the table among others, where it came from the cache.
    """

    sites: list[Site]
    compiled: list[Site]
    num_classes: int
    backend: Backend
    target: Target
    plan: Plan
    network_plan: Plan
    table: LatencyTable | None = None
    cached: Path | None = None

    @property
    def needed(self) -> list[Site]:
        """What a latency table has to hold."""
        return [*self.sites, *self.compiled]

    @property
    def is_here(self) -> bool:
        """Whether the backend can measure the target now."""
        device, runtime = self.target.device, self.target.runtime
        accepts = self.backend.accepts_device(device) and self.backend.accepts_runtime(runtime)
        return self.backend.is_here and accepts

    def latency(self, space: SearchSpace) -> LatencyModel | None:
        """None without a table: MACs and parameters do without one."""
        if self.table is None:
            return None
        calibration = self.table.calibration(space.id, space.settings)
        return LatencyModel(
            space.choices, self.sites, self.table, calibration, excluded=space.excluded
        )

    def sites_of(self, space: SearchSpace, architecture: Architecture) -> list[Site]:
        """What the network of one architecture runs on the target."""
        shape = _input_shape(space, self.target)
        compiled = compiles(self.backend, self.table)
        return trace_architecture(space, architecture, self.num_classes, shape, compiled)

    def networks(
        self, space: SearchSpace, architectures: Sequence[Architecture]
    ) -> list[MeasuredNetwork]:
        """Measure whole networks, at the table's speed where there is one; a few more carefully."""
        return measure_networks(
            [space.build_network(a, self.num_classes) for a in architectures],
            self.backend,
            self.target,
            self.network_plan,
            in_chans=space.in_chans,
            reference_ms=None if self.table is None else self.table.reference_ms,
            anchors=self._anchors(space),
            copies=NUM_COPIES if len(architectures) <= FEW else 1,
        )

    def carefully(
        self, space: SearchSpace, architecture: Architecture, times: int = 2
    ) -> Measurement:
        """The mean of several measurements of a whole network, its anchors loaded anew for each."""
        measured = [self.networks(space, [architecture])[0].measurement for _ in range(times)]
        return Measurement.mean(measured)

    def _anchors(self, space: SearchSpace) -> list[tuple[Network, float]]:
        """Some networks of the calibration, from the fastest to the slowest."""
        calibration = self.table and self.table.calibration(space.id, space.settings)
        found = calibration.anchors if calibration else []
        chosen = found[:: max(1, (len(found) - 1) // (NUM_ANCHORS - 1))]
        return [
            (space.build_network(space.architecture(a["architecture"]), self.num_classes), a["ms"])
            for a in chosen
        ]

    def on_target(self, space: SearchSpace, may_measure: bool = True) -> OnTarget:
        """What can be said of derived networks: predicted with a table, measured where it is."""
        table = self.table

        def predict(calibration: Calibration | None, architecture: Architecture) -> float:
            assert table is not None
            return network_ms(self.sites_of(space, architecture), table, calibration)

        def measure(architecture: Architecture) -> Measurement:
            return self.carefully(space, architecture)

        return OnTarget(
            partial(predict, table.calibration(space.id, space.settings)) if table else None,
            partial(predict, None) if table else None,
            measure if self.is_here and may_measure else None,
        )

    def cost(self, space: SearchSpace, name: str) -> AdditiveCost:
        """The additive cost an objective asks for: latency, macs, params or energy."""
        if name == "latency":
            model = self.latency(space)
            assert model is not None
            return model
        if name == "energy":
            assert self.table is not None
            return energy_cost(space.choices, self.sites, self.table, space.excluded)
        make = {"macs": macs_cost, "params": params_cost}[name]
        return make(space.choices, self.sites, space.excluded)

    def limits(self, space: SearchSpace, objective: Objective) -> tuple[Limit, ...]:
        """The limits of an objective, on additive costs and on peak memory."""
        return tuple(
            Limit(
                self._peak_memory(space) if name == "peak_memory" else self.cost(space, name), upper
            )
            for name, upper in objective.limits.items()
        )

    def _peak_memory(self, space: SearchSpace) -> PeakMemory:
        shape = _input_shape(space, self.target)
        return PeakMemory(space, self.num_classes, shape, self.target.dtype)


def compiles(backend: Backend, table: LatencyTable | None) -> bool:
    """Whether the target's runtime compiles graphs: a table measured elsewhere knows better."""
    return backend.framed if table is None else table.provenance.get("compiled", backend.framed)


def _input_shape(space: SearchSpace, target: Target) -> tuple[int, int, int, int]:
    return target.batch, space.in_chans, target.resolution, target.resolution


def measure_space(cfg: DictConfig, data: Data, space: SearchSpace, with_table: bool) -> Measured:
    """Trace the space for `latency.target`; read its table, or measure and cache it.

    Raises:
        ValueError: the table given is for another target, or lacks operations.
    """
    backend = make_backend(cfg)
    target = make_target(cfg, backend, data)
    classes, shape = data.info.num_classes, _input_shape(space, target)
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


def measure_run(run_cfg: DictConfig, run: Path, data: Data, space: SearchSpace) -> Measured:
    """The same for a finished run, with the table in its folder."""
    path = run / "latency_table.json"
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


def inherited_network(
    run_cfg: DictConfig,
    state: Mapping[str, Any],
    space: SearchSpace,
    architecture: Architecture,
    num_classes: int,
) -> Network:
    """The network of an architecture with the shared weights of a search.

    Args:
        state: of the search, as its checkpoint has it.

    Raises:
        ValueError: the search has no weights that would fit.
    """
    if "supernet" not in state:
        raise ValueError(
            "this search trained no shared weights that a network could inherit: retrain with "
            "init=scratch, or export with weights=FILE of supernet-retrain"
        )
    relaxation = instantiate(run_cfg.mixed_op)
    if not relaxation.inheritable:
        raise ValueError(
            f"the candidates of {type(relaxation).__name__} are not those of a derived network, "
            "which cannot inherit their weights: retrain with init=scratch, or export with "
            "weights=FILE of supernet-retrain"
        )
    supernet = space.build_supernet(num_classes)
    supernet.load_state_dict(state["supernet"])
    network = space.build_network(architecture, num_classes)
    inherit_weights(supernet, network, dict(architecture))
    return network


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


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as a dict."""
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def merged(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    result = OmegaConf.merge(cfg, changes)
    assert isinstance(result, DictConfig)
    return result


def run_config(run: Path) -> DictConfig:
    """The configuration that a run folder was made with.

    Raises:
        ValueError: no run there.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no config.yaml")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config
