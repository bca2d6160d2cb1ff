"""supernet-retrain: train a derived network on its own, beside random ones of equal budget."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.data import Data
from supernet.derive import reachable
from supernet.engine import make_accelerator
from supernet.files import read_json, write_json
from supernet.limits import Cost, Limit
from supernet.network import Network
from supernet.outcome import BEST_AT_RANDOM, RANDOM_SEARCH
from supernet.recipe import Recipe
from supernet.report import write_report
from supernet.retrain import retrain
from supernet.sampling import make_sampler
from supernet.space import SearchSpace
from supernet.tracking import Tracker
from supernet_scripts.common import (
    command,
    hide_other_ranks,
    inherited_network,
    make_objective,
    open_run,
    plain,
    restrict,
    run_config,
    set_up_cpu,
)
from supernet_scripts.measured import Measured
from supernet_scripts.measuring import measure_run, measure_space

log = logging.getLogger(__name__)

BASELINE_RANGE = (0.9, 1.0)  # of the budget


def retrain_networks(run_cfg: DictConfig, cfg: DictConfig, run: Path, folder: Path) -> None:
    """Train the derived network of a run, and the baseline's; write `folder/result.json`.

    Args:
        run_cfg: configuration of the search.
        cfg: recipe, init, retrain_space, baseline, num_baselines, tracker, device, precision,
            resume, and `architecture` where it is not the run's.
        run: folder of the search.
        folder: for the results, one folder in it a network.
    """
    set_up_cpu(cfg)
    accelerator = make_accelerator(cfg.precision, cfg.device)
    data: Data = instantiate(run_cfg.data)
    derived = Architecture.load(cfg.get("architecture") or run / "architecture.json")
    space = SearchSpace.of(derived)
    restrict(space, run_cfg)
    measured = measure_run(run_cfg, run, data, space, accelerator.is_main_process)
    cost = measured.cost(space, run_cfg.objective.cost)
    budget = read_json(run / "result.json", "result")["budget"]
    seed: int = run_cfg.seed
    limits = measured.limits(space, make_objective(run_cfg))
    random = _baseline(cfg, space, cost, budget, limits, derived, seed)
    architectures = {"derived": derived, **random}
    searched = run / RANDOM_SEARCH / "architecture.json"
    if searched.exists() and not cfg.get("architecture"):
        architectures[BEST_AT_RANDOM] = Architecture.load(searched)
    if cfg.retrain_space:
        if cfg.init != "scratch":
            raise ValueError(f"retrain_space={cfg.retrain_space} leaves no weights to inherit; "
                             "set init=scratch")  # fmt: skip
        settings = plain(cfg.retrain_space)
        architectures = {n: SearchSpace.resized(a, settings) for n, a in architectures.items()}
        space = SearchSpace.of(architectures["derived"])
        measured = measure_space(run_cfg, data, space, with_table=False)
    recipe: Recipe = instantiate(cfg.recipe)
    entries = []
    for name, architecture in architectures.items():
        network = _inherited(cfg, run_cfg, run, data, space, architecture)
        tracker: Tracker = instantiate(cfg.tracker)
        with tracker:
            if accelerator.is_main_process:
                own, group = folder / name, str(folder)
                tracker.start(plain(cfg), own, resume=cfg.resume, group=group, name=name)
            entry = retrain(
                architecture,
                data,
                recipe,
                folder / name,
                name=name,
                seed=seed,
                network=network,
                accelerator=accelerator,
                tracker=tracker,
                resume=cfg.resume,
            )
        entries.append(entry)
    predict = measured.on_target(space).predict
    for entry, architecture in zip(entries, architectures.values(), strict=True):
        entry["predicted_ms"] = predict and predict(architecture)
    if accelerator.is_main_process:
        _measure(entries, list(architectures.values()), measured, space)
        write_json(folder / "result.json", {"networks": entries, "budget": budget})


def _baseline(
    cfg: DictConfig,
    space: SearchSpace,
    cost: Cost,
    budget: float | None,
    limits: tuple[Limit, ...],
    derived: Architecture,
    seed: int,
) -> dict[str, Architecture]:
    """Random valid architectures within all limits, at 90-100% of the budget (without one, of the
    derived network's cost; of the dearest network within the limits where that is less).
    """
    if cfg.baseline == "none":
        return {}
    if cfg.baseline != "random":
        raise ValueError(f"baseline={cfg.baseline!r} is unknown; valid: none, random")
    top = budget or cost.of(derived)
    if limits:
        top = min(top, reachable(space, cost, limits)[1])
    low, high = (share * top for share in BASELINE_RANGE)
    generator = torch.Generator().manual_seed(seed)
    sampler = make_sampler(space, cost, low, min(high, reachable(space, cost)[1]), limits)
    return {f"random_{i}": sampler.sample(generator) for i in range(cfg.num_baselines)}


def _inherited(
    cfg: DictConfig,
    run_cfg: DictConfig,
    run: Path,
    data: Data,
    space: SearchSpace,
    architecture: Architecture,
) -> Network | None:
    """A network with the run's shared weights, or None to start from scratch."""
    if cfg.init == "scratch":
        return None
    if cfg.init != "inherit":
        raise ValueError(f"init={cfg.init!r} is unknown; valid: scratch, inherit")
    state = load_checkpoint(run / "checkpoint" / "search.safetensors")["search"]
    return inherited_network(run_cfg, state, space, architecture, data.info.num_classes)


def _measure(
    entries: list[dict[str, Any]],
    architectures: list[Architecture],
    measured: Measured,
    space: SearchSpace,
) -> None:
    """Add measured latency and MACs; all networks are timed in turns."""
    macs = measured.cost(space, "macs")
    timings: list[Any] = [None] * len(entries)
    if measured.is_here:
        found = measured.networks(space, architectures)
        timings = [asdict(one.measurement) for one in found]
    for entry, architecture, timing in zip(entries, architectures, timings, strict=True):
        entry["measured_ms"] = timing
        entry["macs"] = round(macs.of(architecture))


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="retrain")
@command
def _main(cfg: DictConfig) -> None:
    accelerator = make_accelerator(cfg.precision, cfg.device)
    folder = open_run(cfg, accelerator)
    run = Path(cfg.run)
    retrain_networks(run_config(run), cfg, run, folder)
    if accelerator.is_main_process:
        report = write_report(run) if folder == run / "retrain" else folder / "result.json"
        print(f"result: {report}")


def main() -> None:
    hide_other_ranks()
    _main()


if __name__ == "__main__":
    main()
