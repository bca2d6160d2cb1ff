"""From configuration to objects, and the run folder: what the commands share."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
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

from latency.backends.torch_cpu import keep_freed_memory
from latency.samples import Elsewhere
from supernet.benchmark import Benchmark
from supernet.choice import Architecture
from supernet.data import Data
from supernet.derive import check_space
from supernet.engine import Diverged
from supernet.files import write_text
from supernet.inherit import inherit_weights
from supernet.network import Network
from supernet.objective import Objective
from supernet.space import SearchSpace

NETWORKS = "network_latencies.jsonl"  # of spaces whose costs are no sums
UNSAVED = ("resume", "run_dir", "hydra", "benchmark")  # may differ when a run is resumed


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
            message = _message(error)
            sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
            if sweeps or message is None or "HYDRA_FULL_ERROR" in os.environ:
                raise
            raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}") from None

    return wrapped


def _message(error: Exception) -> str | None:
    """What is wrong with the input; None where it is not the input that is wrong."""
    if not isinstance(error, InstantiationException):
        return str(error)
    cause = error.__cause__
    if isinstance(cause, ValueError | Diverged):
        return str(cause)
    pattern = r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
    unknown = re.search(pattern, str(cause))
    group = re.search(r"full_key: (\S+)", str(error))
    if not isinstance(cause, TypeError) or unknown is None or group is None:
        return None
    key = f"{group[1]}.{unknown[2]}"
    return (
        f"{unknown[1]} has no setting {unknown[2]!r}, which this command or its preset gives: take "
        f"it out with '~{key}'"
    )


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
    config = _saved(cfg)
    if not _has_begun(folder):
        overrides = HydraConfig.get().overrides
        named = any("run_dir" in o or ".dir=" in o for o in [*overrides.task, *overrides.hydra])
        if cfg.resume and not named:
            raise ValueError("resume=true needs run_dir=FOLDER, the run to continue")
        if path.exists() and OmegaConf.load(path) != config:
            for name in ("latency_table.json", NETWORKS):  # of another target, perhaps
                (folder / name).unlink(missing_ok=True)
        write_text(path, OmegaConf.to_yaml(config))
        return
    if not cfg.resume:
        raise ValueError(
            f"{folder} holds a run already: continue it with resume=true, or choose another run_dir"
        )
    saved, ours = flat(_saved(run_config(folder))), flat(config)
    if differ := sorted(k for k in {*saved, *ours} if saved.get(k) != ours.get(k)):
        raise ValueError(
            "a run is resumed with the configuration that it was started with; different: "
            + ", ".join(f"{k}={ours.get(k)} (was {saved.get(k)})" for k in differ)
        )


def _saved(cfg: DictConfig) -> DictConfig:
    return OmegaConf.create({k: v for k, v in plain(cfg).items() if k not in UNSAVED})


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


def check_benchmark(cfg: DictConfig, space: SearchSpace) -> None:
    """Refuse a benchmark that could not judge the space's architectures, where one is given.

    Raises:
        ValueError: says what is wrong with it.
    """
    if cfg.benchmark.table is not None:
        Benchmark.check(cfg.benchmark.table, cfg.benchmark.column, space)


def make_objective(cfg: DictConfig) -> Objective:
    objective = instantiate(cfg.objective, _convert_="all")
    assert isinstance(objective, Objective), objective
    return objective


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
