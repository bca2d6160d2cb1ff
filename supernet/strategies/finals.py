"""The last choice: what the search passed through, each trained a little on its own."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from supernet.choice import Architecture
from supernet.engine import Diverged
from supernet.estimators.short_training import ShortTraining
from supernet.recipe import Recipe
from supernet.strategies.base import Run, limit_records
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)


class Finals:
    """Chooses among the architectures that the logits stood for on their way.

    Logits drift: towards what trains fastest in a mixture, skips or convolutions everywhere, and
    past better networks. The networks derived on the way are few, and a short training of each
    tells more of them than the logits do. It goes by successive halving (Jamieson & Talwalkar
    2016): after each round the better half stays and trains anew for twice as long.

    Args:
        look_every: architecture steps between two looks at the derived network.
        num_finalists: of the first round at most: those that were derived for longest.
        steps: of training in the first round.
        rounds: at most; the last one leaves the winner.
        recipe: of the trainings.
        num_images: that judge a network.
    """

    def __init__(
        self,
        *,
        look_every: int,
        num_finalists: int,
        steps: int,
        rounds: int,
        recipe: Recipe,
        num_images: int,
    ) -> None:
        for name, value in (
            ("look_every", look_every),
            ("num_finalists", num_finalists),
            ("steps", steps),
            ("rounds", rounds),
            ("num_images", num_images),
        ):
            if value < 1:
                raise ValueError(f"strategy.finals.{name} must be 1 or more; got {value}")
        self.look_every, self.num_finalists = look_every, num_finalists
        self.steps, self.rounds = steps, rounds
        self.recipe, self.num_images = recipe, num_images

    def look(self, state: SearchState, count: int, last: bool) -> None:
        """Note what would be derived after `count` architecture steps."""
        if count % self.look_every == 0 or last:
            found = state.problem.derive(state.problem.relaxation.scores(state.parameters()))
            state.visited[found] = state.visited.get(found, 0) + 1

    def hold(self, state: SearchState, run: Run) -> None:
        """Train the visited architectures, round after round, into `state.ranked`; a resume goes on
        from the trainings that it finds there."""
        longest = sorted(state.visited, key=lambda a: -state.visited[a])
        standing = longest[: self.num_finalists]
        if run.main:
            log.info(
                "finals: %d architectures were visited, %d are trained on their own",
                len(longest), len(standing),
            )  # fmt: skip
        judge = ShortTraining(state.problem, self.recipe, self.num_images)
        done, played = list(state.ranked), list[dict[str, Any]]()
        for index in range(self.rounds):
            steps = self.steps * 2**index
            played = []
            with run.progress(len(standing), 0, f"final of {len(standing)}, {steps} steps") as bar:
                for architecture in standing:
                    if done:
                        played.append(done.pop(0))
                    else:
                        played.append(self._play(state, judge, architecture, index, steps))
                        state.ranked.append(played[-1])
                        run.log(played[-1])
                        run.save(state.state_dict())
                    bar.update()
            played.sort(key=_result)
            if len(played) == 1:
                break
            keep = played[: math.ceil(len(played) / 2)]
            standing = [state.problem.space.architecture(r["architecture"]) for r in keep]
        if run.main:
            log.info(
                "finals: %s has %.1f%% after %d steps of its own",
                " ".join(played[0]["architecture"].values()), played[0]["accuracy"],
                played[0]["steps"],
            )  # fmt: skip

    def _play(
        self,
        state: SearchState,
        judge: ShortTraining,
        architecture: Architecture,
        index: int,
        steps: int,
    ) -> dict[str, Any]:
        try:
            accuracy, loss = judge.accuracy(architecture, steps)
        except Diverged as error:
            log.warning("a finalist is out: %s", error)
            accuracy, loss = 0.0, sys.float_info.max
        problem = state.problem
        cost = problem.cost.of(architecture)
        return {
            "step": state.step,
            "epoch": state.weight_stream.epoch,
            "phase": "rank",
            "candidate": len(state.ranked),
            "round": index + 1,
            "steps": steps,
            "visits": state.visited[architecture],
            "accuracy": accuracy,
            "loss": loss,
            "cost": cost,
            "limits": limit_records(problem, architecture, {}),
            "rank_value": problem.objective.rank(accuracy, loss, cost),
            "architecture": dict(architecture),
        }


def standings(trainings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last training of each architecture; `rank_value` is its place. A round outranks all
    earlier ones."""
    last = {tuple(record["architecture"].items()): record for record in trainings}
    ordered = sorted(last.values(), key=lambda record: (-record["round"], *_result(record)))
    return [{**record, "rank_value": float(place)} for place, record in enumerate(ordered)]


def _result(record: Mapping[str, Any]) -> tuple[float, float]:
    return record["rank_value"], record["loss"]
