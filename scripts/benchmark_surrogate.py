"""How well PNAS's surrogate ranks cells that are one block larger than those it was fitted to.

    python scripts/benchmark_surrogate.py --cells 40 data=image_folder data.train=FILE

Cells of each size are drawn at random, each is judged by the estimator of a search, and the
surrogate is fitted to all of up to b blocks: its rank correlation is of the cells of b + 1, of
which it has seen none (as in Liu et al. 2018, table 1, with other numbers of cells).
Arguments after the options are those of `supernet-search experiment=pnas_small`.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from scipy.stats import spearmanr

from supernet.engine import make_accelerator
from supernet.files import write_json
from supernet.spaces.block_cell import NUM_INPUTS
from supernet.strategies.base import Problem, Run
from supernet.strategies.growth import Cell, Growth, canonical
from supernet.strategies.progressive import Progressive
from supernet_scripts.common import make_objective, make_space
from supernet_scripts.measuring import measure_space


def make_problem(cfg: DictConfig) -> Problem:
    data = instantiate(cfg.data)
    space = make_space(cfg, data)
    measured = measure_space(cfg, data, space, with_table=False)
    relaxation = instantiate(cfg.mixed_op)
    supernet = space.build_supernet(data.info.num_classes, relaxation.build)
    return Problem(
        space, supernet, relaxation, make_objective(cfg), measured.cost(space, cfg.objective.cost),
        data, make_accelerator("no", "cpu"), seed=cfg.seed,
        estimator=instantiate(cfg.estimator, _convert_="all"),
    )  # fmt: skip


def draw(growth: Growth, num_blocks: int, number: int, generator: torch.Generator) -> list[Cell]:
    """Distinct cells, drawn uniformly among orders of sides and blocks."""
    num_operations, found = len(growth.space.operations), dict[Cell, None]()
    for _ in range(1000 * number):
        sides = []
        for block in range(num_blocks):
            high = (NUM_INPUTS + block) * num_operations
            pair = torch.randint(high, (2,), generator=generator).tolist()
            sides.append(tuple(sorted(divmod(side, num_operations) for side in pair)))
        if growth.fits(cell := canonical(tuple(sides))):
            found[cell] = None
        if len(found) == number:
            break
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=40, help="of each size")
    parser.add_argument("--output", default="surrogate.json")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with initialize_config_module("supernet_conf", version_base="1.3"):
        cfg = compose("search", ["experiment=pnas_small", *args.overrides])
    torch.set_num_threads(cfg.num_threads or 1)
    problem, strategy = make_problem(cfg), instantiate(cfg.strategy, _convert_="all")
    assert isinstance(strategy, Progressive) and problem.estimator is not None
    problem.estimator.prepare(problem, Run.unwritten(), None)
    growth, generator = Growth(problem), torch.Generator().manual_seed(cfg.seed)
    cells, found = list[Cell](), list[float]()
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for size in range(1, growth.num_blocks + 1):
        own = draw(growth, size, args.cells, generator)
        judged = [problem.estimator.estimate(growth.architecture(c)).accuracy for c in own]
        if cells:
            ensemble = strategy.surrogate.fit(
                cells, found, NUM_INPUTS + growth.num_blocks - 1, len(growth.space.operations),
                generator,
            )  # fmt: skip
            seen = spearmanr(ensemble.predict(cells), found).statistic
            larger = spearmanr(ensemble.predict(own), judged).statistic
            rows.append({
                "fitted_blocks": size - 1, "fitted": len(cells), "rank_correlation": float(seen),
                "larger": len(own), "rank_correlation_larger": float(larger),
            })  # fmt: skip
            print(rows[-1], flush=True)
        cells, found = cells + own, found + judged
    write_json(args.output, {
        "rows": rows, "seconds": time.perf_counter() - start, "overrides": args.overrides,
        "seed": cfg.seed, "machine": platform.processor(), "torch": torch.__version__,
        "cells": [[list(map(list, cell)), value] for cell, value in zip(cells, found, strict=True)],
    })  # fmt: skip


if __name__ == "__main__":
    main()
