"""The last word on a derived architecture: its neighbours, each trained a little on its own."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from torch import Tensor

from supernet.choice import Architecture
from supernet.estimators.short_training import ShortTraining, check_precision
from supernet.recipe import Recipe
from supernet.space import SearchSpace, Way
from supernet.strategies.base import Problem, Run

log = logging.getLogger(__name__)


class Refinement:
    """Local search from an architecture (White et al. 2021).

    In a supernet every path runs beside skips, and its gradient is taken at given weights, so that
    it tells what an operation adds, but not how a network trains that has no skip of its own. A few
    steps of a network as deep as the one wanted tell just that. Those who differ from the leader in
    one choice are trained, from the same seed on the same images, the best of them for longer and
    from several seeds, in a race (Maron & Moore 1994) that those leave whose mean loss is more than
    `margin` above the best. Its winner takes the lead where it learns clearly faster: a light
    network always learns a little faster at first, which says nothing of where it ends.

    Args:
        moves: of the lead at most; each costs `num_neighbours` short trainings.
        num_neighbours: tried a move at most: those with the best scores.
        steps: of a short training.
        num_finalists: of a move: its best ones by then are trained anew for `final_steps`.
        final_steps: of them and of the leader.
        repeats: longer trainings, from different seeds, of a finalist that stays in the race.
        margin: by which the winner's mean loss must be below the leader's from the same seeds, in
            nats.
        recipe: of the trainings.
        num_images: of the architecture half that judge a network, in each process.
        settings: of the space in which they differ from the search's, such as `num_cells`.
    """

    def __init__(
        self,
        *,
        moves: int,
        num_neighbours: int,
        steps: int,
        num_finalists: int,
        final_steps: int,
        repeats: int,
        margin: float,
        recipe: Recipe,
        num_images: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        numbers = {
            "moves": moves, "num_neighbours": num_neighbours, "steps": steps,
            "num_finalists": num_finalists, "final_steps": final_steps, "repeats": repeats,
            "num_images": num_images,
        }  # fmt: skip
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"strategy.refinement.{name} must be 1 or more; got {value}")
        if margin < 0:
            raise ValueError(f"strategy.refinement.margin must be 0 or more; got {margin}")
        self.moves, self.num_neighbours = moves, num_neighbours
        self.steps, self.num_finalists, self.final_steps = steps, num_finalists, final_steps
        self.repeats, self.margin = repeats, margin
        self.recipe, self.num_images, self.settings = recipe, num_images, dict(settings or {})

    def check(self, problem: Problem) -> None:
        """Refuse what would be found only after the search, or not at all.

        Raises:
            ValueError: says what to set.
        """
        check_precision(self.recipe, problem.accelerator)
        if not problem.relaxation.has_logits:
            raise ValueError(
                "strategy.refinement starts from what the logits derive, and "
                f"{type(problem.relaxation).__name__} has none: its ranking would be the answer; "
                "set strategy.refinement=null, or use strategy=local_search"
            )

    def refine(
        self,
        problem: Problem,
        run: Run,
        start: Architecture,
        scores: Mapping[str, Tensor],
        trainings: list[dict[str, Any]],
        place: Mapping[str, Any],
    ) -> Iterator[None]:
        """Train the neighbourhood of `start` and of what takes the lead from it.

        Args:
            scores: by choice, of its options.
            trainings: records of those done, taken up where they are the first ones here, and
                added to; after each new one the caller may save.
            place: what a record says of where in the search it is.
        """
        judge = ShortTraining(problem, self.recipe, self.num_images, self.settings)
        done = _Trainings(judge, run, trainings, place)
        leader, tried = start, {start}
        yield from done.add([start], self.final_steps, {"move": 0, "final": True, "repeat": 0})
        for move in range(1, self.moves + 1):
            around = [a for a in self.neighbours(problem, leader, scores) if a not in tried]
            if not around:
                break
            yield from done.add(around, self.steps, {"move": move, "final": False, "repeat": 0})
            tried.update(around)
            short = sorted(done.seen[-len(around) :], key=_loss)[: self.num_finalists]
            racing = [problem.space.architecture(r["architecture"]) for r in short]
            yield from self._race(done, racing, move)
            lead = self.leaders(done.seen)[0]
            if run.main:
                log.info(
                    "move %d: %d neighbours, %d finalists; the leader has a loss of %.3f: %s",
                    move, len(around), len(short), lead["loss"],
                    " ".join(lead["architecture"].values()),
                )  # fmt: skip
            if lead["move"] < move:
                break
            leader = problem.space.architecture(lead["architecture"])

    def _race(
        self, done: _Trainings, architectures: Sequence[Architecture], move: int
    ) -> Iterator[None]:
        """Longer trainings of those that stay within the margin of the best one."""
        space = done.judge.problem.space
        for repeat in range(self.repeats):
            where = {"move": move, "final": True, "repeat": repeat}
            yield from done.add(architectures, self.final_steps, where)
            means = [_mean(records) for records in _finals(done.seen, move, repeat + 1)]
            worst = min(map(_loss, means)) + self.margin
            left = [r["architecture"] for r in means if _loss(r) <= worst]
            architectures = [space.architecture(options) for options in left]
            if len(architectures) == 1:
                break

    def leaders(self, trainings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Who had the lead, the last one first; `rank_value` is the place, `accuracy` and `loss`
        the means of its longer trainings."""
        found: list[Sequence[Mapping[str, Any]]] = []
        for move in range(self.moves + 1):
            finals = _finals(trainings, move)
            if not finals:
                break
            best = min(finals, key=lambda records: (-len(records), _loss(_mean(records))))
            if found:
                common = min(len(best), len(found[0]))  # the leader did not run in this race
                new, old = (_loss(_mean(records[:common])) for records in (best, found[0]))
                if new >= old - self.margin:
                    break
            found.insert(0, best)
        return [{**_mean(records), "rank_value": float(n)} for n, records in enumerate(found)]

    def neighbours(
        self, problem: Problem, leader: Architecture, scores: Mapping[str, Tensor]
    ) -> list[Architecture]:
        """Valid ones within budget and limits, the best score first."""

        def score(architecture: Architecture) -> float:
            chosen = ((problem.space.by_name[name], option) for name, option in architecture)
            return sum(float(scores[c.name][c.index(option)]) for c, option in chosen)

        within = [a for a in one_change(problem.space, leader) if problem.is_feasible(a)]
        return sorted(within, key=score, reverse=True)[: self.num_neighbours]


class _Trainings:
    """The trainings of a refinement; those of before an interruption are taken as they were.

    Args:
        records: of the latter, added to.
        place: what each record says of where in the search it is.
    """

    def __init__(
        self,
        judge: ShortTraining,
        run: Run,
        records: list[dict[str, Any]],
        place: Mapping[str, Any],
    ) -> None:
        self.judge, self.run, self.records, self.place = judge, run, records, place
        self.count = 0

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Records of those that were asked for so far."""
        return self.records[: self.count]

    def add(
        self, architectures: Sequence[Architecture], steps: int, where: Mapping[str, Any]
    ) -> Iterator[None]:
        """Train each, unless that was done; yields after each new training."""
        title = f"move {where['move']}, {steps} steps"
        with self.run.progress(len(architectures), 0, title) as bar:
            for architecture in architectures:
                number, self.count = self.count, self.count + 1
                if number == len(self.records):
                    found = self.judge.record(architecture, steps, where["repeat"])
                    found["rank_value"] = found["loss"]
                    self.records.append({**self.place, "candidate": number, **where, **found})
                    self.run.log(self.records[-1])
                    yield
                bar.update()


def _loss(record: Mapping[str, Any]) -> float:
    return float(record["loss"])


def _finals(
    trainings: Sequence[Mapping[str, Any]], move: int, length: int = 1
) -> list[list[Mapping[str, Any]]]:
    """The longer trainings of each architecture of a move that has `length` or more of them."""
    found = defaultdict[tuple[str, ...], list[Mapping[str, Any]]](list)
    for record in trainings:
        if record["move"] == move and record["final"]:
            found[tuple(record["architecture"].values())].append(record)
    return [records for records in found.values() if len(records) >= length]


def _mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last of several trainings, with the means of all."""
    # `mean` is exact: a diverged training has the largest loss there is
    means = {key: mean(record[key] for record in records) for key in ("accuracy", "loss")}
    return {**records[-1], **means}


def one_change(space: SearchSpace, architecture: Architecture) -> Iterator[Architecture]:
    """For every choice and each of its other options, the valid architectures that have it and
    settle the fewest further choices of its group (`SearchSpace.ways`) in another way.

    A choice that is a group of its own changes alone. In a cell of DARTS an edge that comes in
    drops one of the two that its node has kept.
    """
    options, present = dict(architecture), set(architecture)
    for group in space.ways():
        wanted = {pair for way in group for pair in way} - present
        by_changes = defaultdict[int, list[Way]](list)
        for way in group:
            by_changes[len(set(way) - present)].append(way)
        for _, ways in sorted(by_changes.items()):
            ways = [way for way in ways if not wanted.isdisjoint(way)]
            for way in ways:
                changed = space.architecture({**options, **dict(way)})
                if space.is_valid(changed):
                    wanted.difference_update(way)
                    yield changed

