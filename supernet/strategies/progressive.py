"""Progressive search of cells, from one block to many (Liu et al. 2018)."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr

from supernet.answer import Answer
from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.estimators.base import Estimator
from supernet.space import SearchSpace
from supernet.spaces.block_cell import NUM_INPUTS
from supernet.strategies.base import Problem
from supernet.strategies.growth import Cell, Growth, allows, expand, grows
from supernet.strategies.surrogate import Surrogate
from supernet.strategies.trials import Note, Proposals, Trial, Trials

log = logging.getLogger(__name__)


class Progressive(Trials):
    """Algorithm 1: all cells of one block are judged; then, block by block, a surrogate that is
    fitted to all that were judged ranks the best cells' expansions, and the first of these are
    judged. The best cell of full size is the answer.

    Cells that differ in the order of sides and blocks alone are one. Under a budget, cells that
    are too dear whatever their other blocks are not grown. The surrogate predicts accuracies:
    where the objective weighs accuracy against cost, it does so for the answer alone.

    Beside the trials the journal has, for each size, the rank correlation of predictions and what
    was judged then, as in the paper's table 1, of the cells that were judged.

    Args:
        beam: cells that are judged and expanded, of each size but the first.
        surrogate: how cells are ranked.
        num_evaluations, seconds: as for all `Trials`.
    """

    def __init__(
        self,
        *,
        beam: int,
        surrogate: Surrogate,
        num_evaluations: int | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(num_evaluations=num_evaluations, seconds=seconds)
        if beam < 1:
            raise ValueError(f"strategy.beam must be 1 or more; got {beam}")
        self.beam, self.surrogate = beam, surrogate

    @property
    def is_finite(self) -> bool:
        return True

    def check_space(self, space: SearchSpace) -> None:
        """Refuse a space that does not grow, or that the evaluations do not suffice for.

        Raises:
            ValueError: says what to set.
        """
        super().check_space(space)
        if not grows(space):
            raise ValueError(
                "strategy=progressive grows one kind of cell whose blocks add two sides, and "
                f"{space.id} is not made of such: choose space=pnas"
            )
        first = sum(allows(space, cell) for cell in expand([()], len(space.operations)))
        least = first + (space.num_blocks - 2) * self.beam + 1 if space.num_blocks > 1 else 1
        if self.num_evaluations is not None and self.num_evaluations < least:
            raise ValueError(
                f"num_evaluations={self.num_evaluations} ends before cells have all of their "
                f"{space.num_blocks} blocks: {first} have one, and strategy.beam={self.beam} are "
                f"judged of each size between; set num_evaluations to {least} or more, or lower "
                "strategy.beam or space.num_blocks"
            )

    def check(self, estimator: Estimator | None) -> Estimator:
        found = super().check(estimator)
        if not found.judges_parts:
            raise ValueError(
                "strategy=progressive judges cells of fewer blocks than the space's, which an "
                f"estimator by {found.judge} cannot: choose estimator=from_scratch or zero_cost"
            )
        return found

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        growth = Growth(problem)
        num_operations = len(growth.space.operations)
        judged: dict[Cell, float] = {}
        cells, scores = expand([()], num_operations), list[float]()
        for size in range(1, growth.num_blocks + 1):
            if size > 1:
                largest = [cell for cell in judged if len(cell) == size - 1]
                largest.sort(key=lambda cell: -judged[cell])
                cells = expand(largest[: self.beam], num_operations)
                ensemble = self.surrogate.fit(
                    list(judged), list(judged.values()), NUM_INPUTS + growth.num_blocks - 1,
                    num_operations, generator,
                )  # fmt: skip
                cells, scores = self._best(growth, cells, ensemble.predict(cells))
            cells = [cell for cell in cells if growth.fits(cell)]
            if not cells:
                raise Infeasible(f"no cell of {size} blocks that was grown fits budget and limits")
            trials = yield from _one_by_one(problem, [growth.architecture(c) for c in cells])
            found = [trial.accuracy for trial in trials]
            if size > 1:
                yield self._note(problem, size, len(judged), scores, found)
            judged |= zip(cells, found, strict=True)

    def _best(
        self, growth: Growth, cells: Sequence[Cell], scores: Sequence[float]
    ) -> tuple[list[Cell], list[float]]:
        """Those with the best scores that fit, and their scores."""
        best: list[int] = []
        for index in sorted(range(len(cells)), key=lambda i: -scores[i]):
            if len(best) < self.beam and growth.fits(cells[index]):
                best.append(index)
        return [cells[i] for i in best], [scores[i] for i in best]

    def _note(
        self,
        problem: Problem,
        size: int,
        num_fitted: int,
        scores: Sequence[float],
        found: Sequence[float],
    ) -> Note:
        varies = len(set(scores)) > 1 and len(set(found)) > 1
        correlation = float(spearmanr(scores, found).statistic) if varies else None
        if problem.accelerator.is_main_process:
            log.info(
                "cells of %d blocks: predictions and %d judged have a rank correlation of %s",
                size, len(found), "none" if correlation is None else f"{correlation:.3f}",
            )  # fmt: skip
        return Note({
            "phase": "surrogate", "num_blocks": size, "fitted": num_fitted, "judged": len(found),
            "rank_correlation": correlation,
        })  # fmt: skip

    def answer(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        """
        Raises:
            ValueError: the search ended before a cell of full size was judged.
        """
        if not any(record["phase"] == "rank" for record in state["ranked"]):
            raise ValueError(
                f"the search ended after {len(state['ranked'])} cells of fewer blocks than the "
                "space's, none of which can be the answer: raise max_seconds, or lower "
                "strategy.beam or space.num_blocks"
            )
        return super().answer(problem, state)


def _one_by_one(
    problem: Problem, architectures: Sequence[Architecture]
) -> Generator[Sequence[Architecture], Sequence[Trial], list[Trial]]:
    """In batches so small that the search can end after each."""
    trials: list[Trial] = []
    width = problem.accelerator.num_processes
    for start in range(0, len(architectures), width):
        trials += yield architectures[start : start + width]
    return trials
