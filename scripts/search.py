"""supernet-search: measure, search under a budget, derive, report; `-m` sweeps."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from latency.table import LatencyTable
from supernet.benchmark import Benchmark
from supernet.data import Data
from supernet.derive import check_limits, reachable
from supernet.engine import Diverged, make_accelerator
from supernet.estimators.base import Estimator
from supernet.estimators.short_training import check_precision
from supernet.files import read_json, write_json
from supernet.outcome import RANDOM_SEARCH, OnTarget, conclude, summary
from supernet.report import write_report
from supernet.space import SearchSpace
from supernet.strategies.base import Problem, Run, Strategy
from supernet.strategies.trials import Trials
from supernet.tracking import NoTracker, Tracker
from supernet_scripts.common import (
    check_benchmark,
    command,
    hide_other_ranks,
    make_objective,
    make_space,
    merged,
    open_run,
    plain,
    set_up_cpu,
)
from supernet_scripts.measured import Measured
from supernet_scripts.measuring import measure_space, needs_table, validate_if_new, warn_unvalidated
from supernet_scripts.retrain import retrain_networks

log = logging.getLogger(__name__)

DIVERGED = 100.0  # error in percent: what a sweeper is told of a run that diverged


@command
def run_search(cfg: DictConfig) -> float:
    accelerator = make_accelerator(cfg.precision, cfg.device)
    folder = open_run(cfg, accelerator)
    if cfg.resume and (folder / "report.html").exists():
        log.info("%s is finished", folder)
        return float(read_json(folder / "result.json", "result")["objective"])
    tracker: Tracker = instantiate(cfg.tracker)
    run = Run(folder, accelerator.is_main_process, tracker, cfg.resume, cfg.checkpoint_every)
    with tracker:
        if run.main:
            hydra_cfg = HydraConfig.get()
            group = hydra_cfg.sweep.dir if hydra_cfg.mode == RunMode.MULTIRUN else None
            tracker.start(plain(cfg), folder, resume=cfg.resume, group=group, name=folder.name)
        try:
            return _search(cfg, accelerator, run)
        except Diverged as error:
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                raise
            log.error("diverged: %s", error)
            return DIVERGED


def _search(cfg: DictConfig, accelerator: Accelerator, run: Run) -> float:
    set_seed(cfg.seed)
    set_up_cpu(cfg)
    data = instantiate(cfg.data)
    space = make_space(cfg, data)
    objective = make_objective(cfg)
    if cfg.search_baseline not in ("none", "random"):
        raise ValueError(
            f"search_baseline={cfg.search_baseline!r} is unknown; valid: none, random"
        )
    check_benchmark(cfg, space)
    strategy: Strategy = instantiate(cfg.strategy, _convert_="all")
    strategy.check_space(space)
    estimator = make_estimator(cfg, strategy)
    trains = "recipe" in cfg.random_estimator  # then known before the search, not after it
    if cfg.search_baseline == "random" and estimator is None and trains:
        check_precision(instantiate(cfg.random_estimator.recipe, _convert_="all"), accelerator)
    measured = _measure(cfg, accelerator, run, data, space)
    cost = measured.cost(space, objective.cost)
    limits = measured.limits(space, objective)
    objective.prepare(reachable(space, cost), cost.unit)
    check_limits(space, cost, objective.budget, limits)
    relaxation = instantiate(cfg.mixed_op)
    supernet = space.build_supernet(data.info.num_classes, relaxation.build)
    problem = Problem(
        space, supernet, relaxation, objective, cost, data, accelerator, cfg.seed, limits,
        estimator, measured.costs(space),
    )  # fmt: skip
    answer = strategy.search(problem, run)
    target = measured.on_target(space, cfg.measure)
    result = conclude(problem, run, answer, target, cfg.bn_batches)
    if run.main:
        if cfg.benchmark.table is not None:
            judge(cfg, run.folder, space, result)
        options = [result["architecture"][choice.name] for choice in space.decided]
        log.info("derived: %s", " ".join(options))
        log.info(summary(result))
    if cfg.search_baseline == "random":
        search_at_random(cfg, problem, run, target, result)
    if cfg.retrain:
        retrain_networks(cfg, cfg, run.folder, run.folder / "retrain")
    if run.main:
        for name in ("architecture", "latency_table"):
            if (run.folder / f"{name}.json").exists():
                run.tracker.artifact(run.folder / f"{name}.json", name, name)
        print(f"report: {write_report(run.folder)}")
    return float(result["objective"])


def make_estimator(cfg: DictConfig, strategy: Strategy) -> Estimator | None:
    """What judges the architectures that a strategy tries.

    Raises:
        ValueError: the strategy tries some and there is none, or the other way round.
    """
    given = cfg.get("estimator")
    estimator: Estimator | None = given and instantiate(given, _convert_="all")
    if isinstance(strategy, Trials):
        strategy.check(estimator)
        return estimator
    bounds = {key: cfg.get(key) for key in ("num_evaluations", "max_seconds")}
    if cfg.search_baseline == "none" and any(value is not None for value in bounds.values()):
        given = ", ".join(f"{key}={value}" for key, value in bounds.items() if value is not None)
        raise ValueError(
            f"{given} would be ignored: {type(strategy).__name__} tries no architectures one by "
            "one, and trains for strategy.epochs"
        )
    if estimator is not None:
        raise ValueError(
            f"an estimator judges single architectures, which {type(strategy).__name__} does not "
            "try: leave estimator= out, or choose another strategy (strategy=random)"
        )
    return estimator


def search_at_random(
    cfg: DictConfig, problem: Problem, run: Run, target: OnTarget, result: dict[str, Any]
) -> None:
    """A random search in the same problem, by default of the same cost.

    Args:
        result: of the search.
    """
    settings, own = cfg.random_search, problem
    if problem.estimator is not None:
        settings = merged(settings, {"num_evaluations": result["evaluations"]})
    else:
        own = replace(problem, estimator=instantiate(cfg.random_estimator, _convert_="all"))
        if settings.num_evaluations is None and settings.seconds is None:
            settings = merged(settings, {"seconds": result["seconds"]["search"]})
    strategy: Strategy = instantiate(settings, _convert_="all")
    inner = Run(run.folder / RANDOM_SEARCH, run.main, NoTracker(), cfg.resume)
    found = conclude(own, inner, strategy.search(own, inner), target, cfg.bn_batches)
    if run.main:
        if cfg.benchmark.table is not None:
            judge(cfg, inner.folder, problem.space, found)
        log.info("random search: %s", summary(found))


def judge(cfg: DictConfig, folder: Path, space: SearchSpace, result: dict[str, Any]) -> None:
    """Look the derived architecture up in a benchmark table, which is opened only now."""
    found = Benchmark.load(cfg.benchmark.table, cfg.benchmark.column).judge(
        space, space.architecture(result["architecture"])
    )
    write_json(folder / "result.json", {**result, "benchmark": found})
    log.info(
        "benchmark: %s %.2f%%, rank %d of %d (the best has %.2f%%)",
        found["name"], found["accuracy"], found["rank"], found["of"], found["best"],
    )  # fmt: skip


def _measure(
    cfg: DictConfig, accelerator: Accelerator, run: Run, data: Data, space: SearchSpace
) -> Measured:
    """The latency table, measured by the first process and kept in the run folder."""
    path = run.folder / "latency_table.json"
    if cfg.resume and path.exists():
        cfg = merged(cfg, {"latency": {"table": str(path)}})
    if not needs_table(cfg):
        return measure_space(cfg, data, space, with_table=False)
    measured = measure_space(cfg, data, space, with_table=run.main)
    if not space.additive:
        measured.measure_whole(space, run.folder, run.main)
        return measured
    if run.main:
        validate_if_new(cfg, measured, space)
    table = [measured.table.to_dict() if measured.table else None]
    measured.table = LatencyTable.from_dict(broadcast_object_list(table)[0])
    if run.main:
        measured.table.save(path)
        warn_unvalidated(measured, space)
    return measured


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="search")
def _main(cfg: DictConfig) -> float:
    return run_search(cfg)


def main() -> None:
    hide_other_ranks()
    _main()


if __name__ == "__main__":
    main()
