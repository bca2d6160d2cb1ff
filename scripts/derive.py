"""supernet-derive: from a run folder to architectures under any budgets, ONNX and stock timm."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from supernet.benchmark import Benchmark, best_within
from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.data import Data
from supernet.derive import check_limits, reachable
from supernet.engine import make_accelerator
from supernet.export import export_onnx, export_timm
from supernet.files import read_json, write_json
from supernet.network import Network
from supernet.objective import check_reachable
from supernet.outcome import OnTarget, resolve, summary
from supernet.report import write_pareto
from supernet.space import SearchSpace
from supernet.strategies.base import Problem, Strategy
from supernet.weights_file import load_network
from supernet_scripts.common import (
    check_benchmark,
    command,
    inherited_network,
    make_objective,
    make_space,
    restrict,
    run_config,
    set_up_cpu,
)
from supernet_scripts.measured import Measured
from supernet_scripts.measuring import measure_run

log = logging.getLogger(__name__)


def make_problem(
    run_cfg: DictConfig,
    data: Data,
    space: SearchSpace,
    measured: Measured,
    state: Mapping[str, Any],
) -> Problem:
    """The finished search with its trained supernet."""
    objective, relaxation = make_objective(run_cfg), instantiate(run_cfg.mixed_op)
    cost, limits = measured.cost(space, objective.cost), measured.limits(space, objective)
    supernet = space.build_supernet(data.info.num_classes, relaxation.build)
    if "supernet" in state:
        supernet.load_state_dict(state["supernet"])
    accelerator = make_accelerator(run_cfg.precision, run_cfg.device)
    supernet.to(accelerator.device)
    seed = run_cfg.seed
    return Problem(space, supernet, relaxation, objective, cost, data, accelerator, seed, limits)


def wanted_budgets(cfg: DictConfig) -> list[float]:
    """Those that are asked for; none for the search's own.

    Raises:
        ValueError: both kinds are given.
    """
    given = [value for value in (cfg.budget_ms, cfg.budget) if value is not None]
    if len(given) > 1:
        raise ValueError("give budget_ms (latency) or budget (any other cost), not both")
    return [float(v) for value in given for v in (value if OmegaConf.is_list(value) else [value])]


def derive_all(
    cfg: DictConfig,
    problem: Problem,
    answer: Any,
    target: OnTarget,
    folder: Path,
    budgets: Sequence[float | None],
) -> list[tuple[Architecture, Path]]:
    """One architecture a budget; several get a folder each, and a comparison.

    A benchmark table is opened once all are derived.
    """
    unit = problem.cost.unit
    for budget in budgets:
        if budget is not None:
            check_reachable(problem.cost.name, budget, reachable(problem.space, problem.cost), unit)
        check_limits(problem.space, problem.cost, budget, problem.limits)
    results, found = [], []
    for budget in budgets:
        if budget is not None:
            log.info("budget %.6g %s", budget, unit)
        result = resolve(problem, answer, target, cfg.bn_batches, budget)
        log.info("%s", summary(result))
        own = folder if len(budgets) == 1 else folder / "budgets" / f"{budget:g}"
        architecture = problem.space.architecture(result["architecture"])
        architecture.save(own / "architecture.json")
        results.append(result)
        found.append((architecture, own))
    front = None if cfg.benchmark.table is None else judge(cfg, problem, results)
    if len(budgets) > 1:
        write_json(folder / "budgets" / "result.json", results)
        title = f"Budgets of {folder.resolve().name}"
        page = write_pareto(results, title, folder / "budgets" / "pareto.html", front)
        print(f"report: {page}")
    return found


def judge(
    cfg: DictConfig, problem: Problem, results: Sequence[dict[str, Any]]
) -> list[tuple[float, float]]:
    """Add to each result what a benchmark table says of it, and the best that the table holds
    within its budget; return the table's front."""
    table = Benchmark.load(cfg.benchmark.table, cfg.benchmark.column)
    front = table.front(problem.space, problem.cost)
    for result in results:
        found = table.judge(problem.space, problem.space.architecture(result["architecture"]))
        # measured, a network may meet a budget that its prediction exceeds
        room = max(result["predicted"], result["budget"] or math.inf)
        result["benchmark"] = {**found, "best_within": best_within(front, room)}
        log.info(
            "benchmark: %s %.2f%%, rank %d of %d; the best within %.4g %s has %.2f%%",
            found["name"], found["accuracy"], found["rank"], found["of"], room, problem.cost.unit,
            result["benchmark"]["best_within"],
        )  # fmt: skip
    return front


def _network(
    cfg: DictConfig,
    run_cfg: DictConfig,
    found: Architecture,
    num_classes: int,
    state: Mapping[str, Any],
) -> Network:
    """With retrained weights where they are given, else with the supernet's."""
    if cfg.weights is not None:
        network, meta = load_network(cfg.weights)
        if Architecture.from_dict(meta["architecture"]) != found:
            raise ValueError(f"{cfg.weights} holds another architecture than the derived one")
        return network
    return inherited_network(run_cfg, state, SearchSpace.of(found), found, num_classes)


def _write(
    cfg: DictConfig,
    run_cfg: DictConfig,
    found: Architecture,
    folder: Path,
    num_classes: int,
    state: Mapping[str, Any],
) -> Sequence[Path]:
    """The formats that are asked for."""
    found.save(folder / "architecture.json")
    written = [folder / "architecture.json"]
    if cfg.onnx or cfg.timm:
        network = _network(cfg, run_cfg, found, num_classes, state).eval()
        if cfg.onnx:
            written.append(folder / "network.onnx")
            export_onnx(network, written[-1])
        if cfg.timm:
            export_timm(network, found, folder)
            written.append(folder / "timm_model.safetensors")
    return written


def bracket_budgets(arguments: list[str]) -> list[str]:
    """`budget_ms=2,3` as `budget_ms=[2,3]`: one command with several budgets, not a sweep."""
    several = re.compile(r"^(budget(?:_ms)?)=([^\[\]]*,[^\[\]]*)$")
    return [several.sub(r"\1=[\2]", argument) for argument in arguments]


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="derive")
@command
def _main(cfg: DictConfig) -> None:
    run = Path(cfg.run)
    run_cfg = run_config(run)
    set_up_cpu(run_cfg)
    folder = run if cfg.output is None else Path(cfg.output)
    data: Data = instantiate(run_cfg.data)
    space = make_space(run_cfg, data)
    restrict(space, cfg)
    check_benchmark(cfg, space)
    state = load_checkpoint(run / "checkpoint" / "search.safetensors")["search"]
    budgets: list[float | None] = [*wanted_budgets(cfg)]
    if cfg.exclude or cfg.at_most:
        budgets = budgets or [read_json(run / "result.json", "result")["budget"]]
    if budgets:
        measured = measure_run(run_cfg, run, data, space)
        problem = make_problem(run_cfg, data, space, measured, state)
        strategy: Strategy = instantiate(run_cfg.strategy, _convert_="all")
        target = measured.on_target(space, cfg.measure)
        found = derive_all(cfg, problem, strategy.answer(problem, state), target, folder, budgets)
    else:
        found = [(Architecture.load(run / "architecture.json"), folder)]
    for architecture, own in found:
        classes = data.info.num_classes
        for path in _write(cfg, run_cfg, architecture, own, classes, state):
            print(f"wrote {path}")


def main() -> None:
    sys.argv = bracket_budgets(sys.argv)
    _main()


if __name__ == "__main__":
    main()
