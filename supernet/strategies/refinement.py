"""The last word on a derived architecture: its neighbours, each trained a little on its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from supernet.choice import Architecture
from supernet.engine import Diverged
from supernet.estimators.short_training import ShortTraining
from supernet.recipe import Recipe
from supernet.space import SearchSpace
from supernet.strategies.base import Problem, Run
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)


class Refinement:
    """Local search from the architecture that the logits stand for (White et al. 2021).

    In a supernet every path runs beside skips, so the logits tell what an operation adds, but not
    whether a network trains that has no skip of its own. A few steps of a network as deep as the
    one wanted tell just that. Those who differ from the leader in one choice are trained, from the
    same weights on the same images, and the best takes the lead where it learns clearly faster: a
    light network always learns a little faster at first, which says nothing of where it ends.

    Args:
        moves: of the lead at most; each costs `num_neighbours` trainings.
        num_neighbours: tried a move at most: those that the logits like best.
        steps: of a training.
        margin: share of the leader's loss by which a neighbour must fall below it. The loss is the
            mean over the second half of the training's steps (Ru et al. 2021, equation 1).
        recipe: of the trainings.
        settings: of the space in which they differ from the search's, such as `num_cells`.
    """

    def __init__(
        self,
        *,
        moves: int,
        num_neighbours: int,
        steps: int,
        margin: float,
        recipe: Recipe,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        numbers = {"moves": moves, "num_neighbours": num_neighbours, "steps": steps}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"strategy.refinement.{name} must be 1 or more; got {value}")
        if not 0 <= margin < 1:
            raise ValueError(f"strategy.refinement.margin must be from 0 to below 1; got {margin}")
        self.moves, self.num_neighbours = moves, num_neighbours
        self.steps, self.margin = steps, margin
        self.recipe, self.settings = recipe, dict(settings or {})

    def refine(self, state: SearchState, run: Run, start: Architecture) -> None:
        """Train the neighbourhood of `start` and of what takes the lead from it, into
        `state.ranked`; a resume goes on from the trainings that it finds there."""
        problem = state.problem
        scores = problem.space.scores(problem.relaxation.scores(state.parameters()))
        judge = ShortTraining(problem, self.recipe, num_images=0, settings=self.settings)
        done, seen, leader = list(state.ranked), {start}, start
        state.ranked, around = [], [start]
        for move in range(self.moves + 1):
            with run.progress(len(around), 0, f"refinement, move {move}") as bar:
                for architecture in around:
                    if done:
                        state.ranked.append(done.pop(0))
                    else:
                        state.ranked.append(self._train(state, judge, architecture, move))
                        run.log(state.ranked[-1])
                        run.save(state.state_dict())
                    bar.update()
            seen.update(around)
            lead = self.leaders(state.ranked)[0]
            if run.main:
                log.info(
                    "refinement, move %d: %d trained, the leader has a loss of %.3f: %s",
                    move, len(around), lead["loss"], " ".join(lead["architecture"].values()),
                )  # fmt: skip
            if lead["move"] < move:
                break
            leader = problem.space.architecture(lead["architecture"])
            around = [a for a in self.neighbours(problem, leader, scores) if a not in seen]
            if not around:
                break

    def leaders(self, trainings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Who had the lead, the last one first; `rank_value` is the place."""
        found: list[Mapping[str, Any]] = []
        for move in range(self.moves + 1):
            tried = [r for r in trainings if r["move"] == move]
            best = min(tried, key=lambda r: r["loss"], default=None)
            if best is None or found and best["loss"] >= (1 - self.margin) * found[0]["loss"]:
                break
            found.insert(0, best)
        return [{**record, "rank_value": float(place)} for place, record in enumerate(found)]

    def neighbours(
        self, problem: Problem, leader: Architecture, scores: Mapping[str, Tensor]
    ) -> list[Architecture]:
        """Valid ones within budget and limits, the best score first."""

        def score(architecture: Architecture) -> float:
            chosen = ((problem.space.by_name[name], option) for name, option in architecture)
            return sum(float(scores[c.name][c.index(option)]) for c, option in chosen)

        within = [a for a in one_change(problem.space, leader) if _is_within(problem, a)]
        return sorted(within, key=score, reverse=True)[: self.num_neighbours]

    def _train(
        self, state: SearchState, judge: ShortTraining, architecture: Architecture, move: int
    ) -> dict[str, Any]:
        try:
            loss = judge.train_loss(architecture, self.steps)
        except Diverged as error:
            log.warning("a neighbour is out: %s", error)
            loss = sys.float_info.max
        return {
            "step": state.step,
            "epoch": state.weight_stream.epoch,
            "phase": "refine",
            "candidate": len(state.ranked),
            "move": move,
            "steps": self.steps,
            "loss": loss,
            "cost": state.problem.cost.of(architecture),
            "architecture": dict(architecture),
        }


def one_change(space: SearchSpace, architecture: Architecture) -> Iterator[Architecture]:
    """All valid architectures that differ in one choice."""
    options = dict(architecture)
    for choice in space.choices:
        for option in space.allowed(choice):
            changed = space.architecture({**options, choice.name: option})
            if changed != architecture and space.is_valid(changed):
                yield changed


def _is_within(problem: Problem, architecture: Architecture) -> bool:
    budget = problem.objective.budget
    return (budget is None or problem.cost.of(architecture) <= budget) and all(
        limit.holds(architecture) for limit in problem.limits
    )
