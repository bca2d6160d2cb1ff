"""Strategies that try architectures: what they share, and what they ask for."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from supernet.answer import Answer, BestTried
from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.estimators.base import Estimate, Estimator
from supernet.strategies.base import Problem, Run, Strategy, rank_record

log = logging.getLogger(__name__)

PURPOSE = 1  # beside the seed: by the seed alone, `Ranking` draws from the same range
MAX_REPEATS = 1000  # proposals in a row of which nothing is new: there are no others


class Trial(NamedTuple):
    """An architecture and what is known of it.

    Attributes:
        accuracy: as the estimator has it.
        reward: to be maximised; what the objective makes of accuracy, loss and cost.
    """

    architecture: Architecture
    accuracy: float
    reward: float


@dataclass(frozen=True)
class Note:
    """What a strategy has to say between its proposals: a line of the journal.

    Attributes:
        record: JSON values, with their `phase`.
    """

    record: Mapping[str, Any]


# Yields architectures, all of them within budget and limits, and is sent a trial of each; or yields
# a note, and is sent nothing.
Proposals = Generator[Sequence[Architecture] | Note, Sequence[Trial], None]


class Trials(Strategy):
    """A search that tries architectures, one by one or in batches, and learns from their rewards.

    A subclass says which ones (`propose`). The problem's estimator judges each architecture once:
    if it is proposed again, it costs nothing. The search ends where the first of the bounds is
    reached, where the proposals end, or where none of a thousand in a row is new.

    Parts, architectures of other settings of the space, say of fewer blocks, teach the strategy
    something. They have no cost and cannot be the answer.

    A search is resumed by proposing anew, from the same seed, with the trials that are known.

    Args:
        num_evaluations: largest number of architectures that are judged; None for no bound.
        seconds: none is begun after so many.
    """

    sums_costs = False
    mixes = False

    def __init__(
        self, *, num_evaluations: int | None = None, seconds: float | None = None
    ) -> None:
        bounds = {"num_evaluations": num_evaluations, "seconds": seconds}
        for name, value in bounds.items():
            kinds = int | float if name == "seconds" else int
            if value is not None and not (isinstance(value, kinds) and value > 0):
                what = "a number" if name == "seconds" else "a whole number"
                raise ValueError(f"strategy.{name} must be {what} above 0; got {value!r}")
        self.num_evaluations, self.seconds = num_evaluations, seconds

    @abstractmethod
    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        """Yield batches of architectures; each `yield` gives their trials, in the same order.

        Args:
            generator: the source of all randomness, alike in all processes.
        """

    def check(self, estimator: Estimator | None) -> Estimator:
        """Refuse before the search what it could not do.

        Raises:
            ValueError: there is no estimator, or nothing ends the search.
        """
        name = type(self).__name__
        if estimator is None:
            raise ValueError(
                f"{name} needs an estimator of architectures: estimator=from_scratch, "
                "shared_weights, zero_cost or table"
            )
        if self.num_evaluations is None and self.seconds is None and not self.is_finite:
            raise ValueError(f"{name} would never end: set num_evaluations or max_seconds")
        if self.num_evaluations is not None and self.num_evaluations <= self.num_first:
            log.warning(
                "%s draws its first %d architectures at random, and no more than %d are judged: "
                "lower strategy.population, or raise num_evaluations",
                name, self.num_first, self.num_evaluations,
            )  # fmt: skip
        return estimator

    @property
    def num_first(self) -> int:
        """How many architectures are proposed before what was judged decides."""
        return 0

    @property
    def is_finite(self) -> bool:
        """Whether the proposals come to an end by themselves."""
        return False

    def search(self, problem: Problem, run: Run) -> Answer:
        self.check_space(problem.space)
        estimator = self.check(problem.estimator)
        saved = run.load()
        estimator.prepare(problem, run, saved)
        saved = saved or {}
        known = _Known(
            problem, run, estimator, list(saved.get("ranked", [])), saved.get("num_notes", 0)
        )
        proposals = known.take_notes(self.propose(problem, make_generator(problem.seed)))
        name = type(self).__name__
        with run.progress(self.num_evaluations or 0, 0, name) as bar:
            in_full = self._try(proposals, known, run, bar)
        if run.main and not in_full and not self.is_finite:
            log.warning("%s ended early: nothing that it proposed any more was new", name)
        run.save(known.state_dict())
        answer = self.answer(problem, known.state_dict())
        if run.main:
            whole = (r for r in known.records if r["phase"] == "rank")
            best = min(whole, key=lambda r: (r["rank_value"], r["loss"]))
            log.info(
                "%s: %d architectures judged by %s; %s has %.4g",
                name, len(known.records), estimator.judge,
                " ".join(best["architecture"].values()), best["accuracy"],
            )  # fmt: skip
        return answer

    def answer(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        return BestTried(problem.space, state["ranked"], problem.limits)

    def _try(
        self,
        proposals: Generator[Sequence[Architecture], Sequence[Trial], None],
        known: _Known,
        run: Run,
        bar: tqdm[Any],
    ) -> bool:
        """Judge what is proposed; gives whether one of the bounds was reached.

        Raises:
            Infeasible: nothing is proposed.
        """
        wanted, repeats = next(proposals, None), 0
        if wanted is None:
            raise Infeasible(
                f"{type(self).__name__} proposed no architecture within the space's constraints, "
                "budget and limits: raise the budget, or use strategy=evolution, which samples "
                "within them"
            )
        while not self._is_over(known, run):
            new = known.new(wanted)
            if self.num_evaluations is not None:
                new = new[: self.num_evaluations - known.count]
            for _ in known.judge(new):
                bar.update()
            repeats = 0 if new else repeats + 1
            if known.new(wanted):
                return True
            if repeats == MAX_REPEATS:
                return False
            try:
                wanted = proposals.send([known.trials[a] for a in wanted])
            except StopIteration:
                return False
        return True

    def _is_over(self, known: _Known, run: Run) -> bool:
        """The same in all processes."""
        enough = self.num_evaluations is not None and known.count >= self.num_evaluations
        # What is known already was in time when it was judged.
        late = self.seconds is not None and not known.replays and run.seconds >= self.seconds
        return bool(broadcast_object_list([enough or (late and known.count > 0)])[0])


@dataclass
class _Known:
    """The trials of a search.

    Attributes:
        records: of all that were judged, those of before an interruption included.
        num_notes: written before an interruption.
        count: how many of them were asked for by now.
    """

    problem: Problem
    run: Run
    estimator: Estimator
    records: list[dict[str, Any]]
    num_notes: int = 0

    def __post_init__(self) -> None:
        self._before = {self._architecture(r): r for r in self.records}
        self.trials: dict[Architecture, Trial] = {}

    def _architecture(self, record: Mapping[str, Any]) -> Architecture:
        space = self.problem.space
        if "settings" in record:
            space = space.resettled(record["settings"])
        return space.architecture(record["architecture"])

    @property
    def count(self) -> int:
        return len(self.trials)

    @property
    def replays(self) -> bool:
        """Whether some of before the interruption were not asked for yet."""
        return self.count < len(self._before)

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.estimator.state_dict(), "ranked": self.records, "num_notes": self.num_notes,
        }  # fmt: skip

    def take_notes(
        self, proposals: Proposals
    ) -> Generator[Sequence[Architecture], Sequence[Trial], None]:
        """The batches alone; notes are written, unless they were before an interruption."""
        number = 0
        with suppress(StopIteration):
            wanted = next(proposals)
            while True:
                if not isinstance(wanted, Note):
                    wanted = proposals.send((yield wanted))
                    continue
                number += 1
                if number > self.num_notes:
                    step = self.estimator.steps_before + self.count
                    self.run.log({"step": step, "epoch": 0, **wanted.record})
                    self.num_notes = number
                wanted = next(proposals)

    def new(self, architectures: Sequence[Architecture]) -> list[Architecture]:
        """Those that were never asked for, once each."""
        return [a for a in dict.fromkeys(architectures) if a not in self.trials]

    def judge(self, architectures: Sequence[Architecture]) -> Generator[None, None, None]:
        """Judge each, in as many processes as there are side by side; yields after each."""
        width = self.problem.accelerator.num_processes
        todo = [a for a in architectures if a not in self._before]
        for architecture in architectures:
            if architecture in self._before:
                self._take(architecture, self._before[architecture])
                yield
        for start in range(0, len(todo), width):
            chunk = todo[start : start + width]
            for architecture, found in zip(chunk, self._estimate(chunk, width), strict=False):
                self._take(architecture, self._record(architecture, found))
                self.records.append(self._last)
                self.run.log(self._last, {"seconds": self.run.seconds})
                yield
            self.run.save_in_time(self.state_dict)

    def _estimate(self, chunk: Sequence[Architecture], width: int) -> list[Estimate]:
        for architecture in chunk:
            whole = architecture.settings == self.problem.space.settings
            assert not whole or self.problem.is_feasible(architecture), (
                f"out of bounds: {architecture}"
            )
        if width == 1:
            return [self.estimator.estimate(chunk[0])]
        accelerator = self.problem.accelerator
        rank = accelerator.process_index
        found = torch.zeros(width, 2, dtype=torch.float64)
        if rank < len(chunk):
            found[rank] = found.new_tensor(self.estimator.estimate(chunk[rank]))
        found = accelerator.reduce(found.to(accelerator.device), reduction="sum")
        return [Estimate(*pair) for pair in found.tolist()]

    def _take(self, architecture: Architecture, record: dict[str, Any]) -> None:
        reward = -record["rank_value"]
        self.trials[architecture] = Trial(architecture, record["accuracy"], reward)
        self._last = record

    def _record(self, architecture: Architecture, found: Estimate) -> dict[str, Any]:
        number, space = len(self.records), self.problem.space
        record = {
            "step": self.estimator.steps_before + number + 1, "epoch": 0, "candidate": number,
            "judge": self.estimator.judge, "unit": self.estimator.unit,
            "oracle": self.estimator.oracle,
        }  # fmt: skip
        if architecture.settings != space.settings:
            ours, theirs = json.loads(space.settings), json.loads(architecture.settings)
            return {
                **record, "phase": "part", **found._asdict(), "rank_value": -found.accuracy,
                "settings": {k: v for k, v in theirs.items() if v != ours[k]},
                "architecture": dict(architecture),
            }  # fmt: skip
        costs = {cost.name: cost.of(architecture) for cost in self.problem.costs}
        return {**record, "costs": costs, **rank_record(self.problem, architecture, *found)}


def make_generator(seed: int) -> torch.Generator:
    """The source of what a search proposes."""
    state = np.random.SeedSequence((seed, PURPOSE)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
