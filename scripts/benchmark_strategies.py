"""Strategies side by side on a benchmark's table: many seeds in seconds, all of one cost.

    python scripts/benchmark_strategies.py --table FILE random aging_evolution,population=10

A strategy is the name of a file of conf/strategy, and its settings after commas. The table is the
estimator, so that this is the work of an oracle: a choice by the very figures that judge it. What
random search is expected to find is computed from the table as well.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from supernet.benchmark import Benchmark
from supernet.engine import make_accelerator
from supernet.estimators.table import Table
from supernet.files import write_json
from supernet.strategies.base import Problem, Run
from supernet.strategies.trials import Trials
from supernet_scripts.common import make_objective, make_space
from supernet_scripts.measuring import measure_space

Z95 = statistics.NormalDist().inv_cdf(0.975)


def expected_best(values: Sequence[float], number: int) -> float:
    """The mean of the largest of `number` values drawn without replacement."""
    total = math.comb(len(values), number)
    shares = (math.comb(rank, number - 1) / total for rank in range(len(values)))
    return math.fsum(v * share for v, share in zip(sorted(values), shares, strict=True))


def configure(strategy: str, args: argparse.Namespace) -> DictConfig:
    """The configuration of a search for `strategy`, as "name,setting=value,..."."""
    name, *settings = strategy.split(",")
    own = [f"strategy={name}", *(f"strategy.{setting}" for setting in settings)]
    shared = [f"space={args.space}", "data=digits", "objective=none", "objective.cost=params"]
    bound = f"strategy.num_evaluations={args.evaluations}"
    with initialize_config_module("supernet_conf", version_base="1.3"):
        return compose("search", [*shared, *own, bound])


def make_problem(cfg: DictConfig, table: Table) -> Problem:
    """Without any training: its data and supernet stay as they are."""
    data = instantiate(cfg.data)
    space = make_space(cfg, data)
    cost = measure_space(cfg, data, space, with_table=False).cost(space, "params")
    relaxation = instantiate(cfg.mixed_op)
    supernet = space.build_supernet(data.info.num_classes, relaxation.build)
    return Problem(
        space, supernet, relaxation, make_objective(cfg), cost, data, make_accelerator("no", "cpu"),
        seed=0, estimator=table,
    )  # fmt: skip


def best_so_far(strategy: Trials, problem: Problem, seed: int) -> list[float]:
    """The best accuracy after each evaluation."""
    answer: Any = strategy.search(replace(problem, seed=seed), Run.unwritten())
    accuracies = [record["accuracy"] for record in answer.ranked]
    return [max(accuracies[: n + 1]) for n in range(len(accuracies))]


def describe(curves: Sequence[Sequence[float]], seconds: float) -> dict[str, Any]:
    """What a strategy found over the seeds: curves have the median and the quartiles."""
    finals = [curve[-1] for curve in curves]
    error = statistics.stdev(finals) / math.sqrt(len(finals))
    length = max(map(len, curves))
    padded = torch.tensor([[*c, *[c[-1]] * (length - len(c))] for c in curves])
    quartiles = torch.quantile(padded, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    return {
        "n": len(finals),
        "mean": statistics.fmean(finals),
        "standard_error": error,
        "interval": [statistics.fmean(finals) + sign * Z95 * error for sign in (-1, 1)],
        "least": min(finals),
        "most": max(finals),
        "evaluations": [min(map(len, curves)), length],
        "seconds_each": seconds / len(finals),
        "quartiles": quartiles.tolist(),
    }


def table_of(rows: dict[str, dict[str, Any]], expected: float) -> str:
    lines = ["| strategy | mean best | 95% interval | beside random | evaluations | s a run |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        low, high = row["interval"]
        first, last = row["evaluations"]
        ahead, error = row["mean"] - expected, row["standard_error"]
        errors = f" ({ahead / error:+.1f} standard errors)" if error else ""
        lines.append(
            f"| `{name}` | {row['mean']:.3f} | {low:.3f} to {high:.3f} | {ahead:+.3f}{errors} "
            f"| {first} to {last} "
            f"| {row['seconds_each']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", required=True, help="CSV file of the benchmark")
    parser.add_argument("--column", help="of its accuracies, where there are several")
    parser.add_argument("--space", default="nasbench201")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", default="strategies.json")
    parser.add_argument("strategies", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for text in args.strategies:
        cfg = configure(text, args)
        problem = make_problem(cfg, Table(args.table, args.column))
        strategy = instantiate(cfg.strategy, _convert_="all")
        start = time.perf_counter()
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        curves = [best_so_far(strategy, problem, seed) for seed in seeds]
        rows[text] = describe(curves, time.perf_counter() - start)
        print(f"{text}: {rows[text]['mean']:.3f}", flush=True)
    benchmark = Benchmark.load(args.table, args.column)
    cells = {problem.space.from_string(text): v for text, v in benchmark.accuracies.items()}
    drawn = [value for cell, value in cells.items() if problem.space.is_valid(cell)]
    expected = expected_best(drawn, args.evaluations)
    found = {
        "expected_of_random": expected, "from": len(drawn), "space": args.space, "strategies": rows,
        "seeds": [seeds.start, seeds.stop - 1], "machine": platform.processor(),
        "torch": torch.__version__,
    }  # fmt: skip
    write_json(args.output, found)
    print(table_of(rows, expected))
    print(f"random search is expected to find {expected:.3f}, computed from {len(drawn)} cells")


if __name__ == "__main__":
    main()
