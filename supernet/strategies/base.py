"""What a strategy is given, where it writes, and what it returns."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from latency.model import AdditiveCost
from supernet.answer import Answer
from supernet.checkpoint import load_checkpoint, save_checkpoint
from supernet.choice import Architecture
from supernet.data import Data
from supernet.derive import derive
from supernet.limits import Cost, Limit
from supernet.mixed_ops.base import Relaxation
from supernet.network import Network
from supernet.objective import Objective
from supernet.sampling import Sampler, make_sampler
from supernet.space import SearchSpace
from supernet.tracking import Journal, NoTracker, Tracker, flatten

if TYPE_CHECKING:
    from supernet.estimators.base import Estimator

SAVING_SHARE = 0.05  # of the time that a search may spend on checkpoints between its stages


@dataclass
class Problem:
    """One search: what to find and by which measure.

    Attributes:
        cost: what the objective's budget is for.
        limits: on further costs, those of `objective.limits`.
        estimator: judges single architectures, for a strategy that tries them.
        costs: all that are known of the space, which records of architectures have.
    """

    space: SearchSpace
    supernet: Network
    relaxation: Relaxation
    objective: Objective
    cost: Cost
    data: Data
    accelerator: Accelerator
    seed: int
    limits: tuple[Limit, ...] = ()
    estimator: Estimator | None = None
    costs: tuple[Cost, ...] = ()

    @property
    def additive(self) -> AdditiveCost:
        """The cost, where it has an expectation: `Strategy.check_space` has seen to that."""
        assert isinstance(self.cost, AdditiveCost), self.cost.name
        return self.cost

    def is_feasible(self, architecture: Architecture) -> bool:
        """Whether it is valid, and within budget and limits."""
        budget = self.objective.budget
        return (
            self.space.is_valid(architecture)
            and (budget is None or self.cost.of(architecture) <= budget)
            and all(limit.holds(architecture) for limit in self.limits)
        )

    def scores(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `Relaxation.scores`; an option's has that of its choice among the inputs of a
        node added to it, where the logits have nodes (Xu et al. 2020, section 3.3)."""
        found = self.relaxation.scores(logits)
        for choice in self.space.choices:
            if choice.into is not None and choice.into.name in found:
                share = found[choice.into.name][choice.into.index(choice.name)]
                found[choice.name] = found[choice.name] + share
        return {choice.name: found[choice.name] for choice in self.space.decided}

    def shares(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`SearchSpace.shares`: nodes cost nothing, whatever their inputs weigh."""
        decided = self.space.decided
        return self.space.shares({choice.name: probabilities[choice.name] for choice in decided})

    def inputs(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the inputs of nodes weigh, by node, where the logits have nodes."""
        nodes = {name: v for name, v in logits.items() if name not in self.space.by_name}
        return self.relaxation.probabilities(nodes)

    def derive(self, scores: Mapping[str, Tensor]) -> Architecture:
        """The best architecture within budget and limits."""
        return derive(self.space, scores, self.cost, self.objective.budget, self.limits)

    def sampler(self) -> Sampler:
        """Draws uniformly from the architectures within budget and limits."""
        budget = self.objective.budget
        high = float("inf") if budget is None else budget
        return make_sampler(self.space, self.cost, 0.0, high, self.limits)

    def expected(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expected value of each limited cost that is additive, by name."""
        return {
            limit.cost.name: limit.cost.expected(weights)
            for limit in self.limits
            if isinstance(limit.cost, AdditiveCost)
        }


def limit_records(
    problem: Problem, derived: Architecture, expected: Mapping[str, Tensor | float]
) -> dict[str, dict[str, Any]]:
    """How each limit stands, by name, as JSON values.

    Args:
        derived: the architecture that has to be within them.
        expected: by name, of those that have an expectation.
    """
    records = {}
    for limit in problem.limits:
        name = limit.cost.name
        records[name] = {
            "unit": limit.cost.unit,
            "limit": limit.upper,
            "expected": float(expected[name]) if name in expected else None,
            "derived": limit.cost.of(derived),
            "multiplier": problem.objective.multipliers.get(name),
        }
    return records


def rank_record(
    problem: Problem, architecture: Architecture, accuracy: float, loss: float
) -> dict[str, Any]:
    """What the journal says of an architecture that was judged, as JSON values."""
    cost = problem.cost.of(architecture)
    return {
        "phase": "rank",
        "accuracy": accuracy,
        "loss": loss,
        "cost": cost,
        "limits": limit_records(problem, architecture, {}),
        "rank_value": problem.objective.rank(accuracy, loss, cost),
        "architecture": dict(architecture),
    }


class Strategy(ABC):
    """How supernet and logits are trained.

    Attributes:
        sums_costs: whether it needs costs that are sums over choices.
        mixes: whether its steps may run several options of a choice.
    """

    sums_costs: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    def check_space(self, space: SearchSpace) -> None:
        """Refuse a space whose costs or supernet the strategy could not use.

        Raises:
            ValueError: says which strategies can.
        """
        if self.sums_costs and not space.additive:
            raise ValueError(
                f"{type(self).__name__} needs the expected cost of a mixture, a sum over choices; "
                f"in {space.id} a layer's cost depends on several choices at once: choose a "
                "strategy that tries architectures one by one (strategy=random "
                "estimator=from_scratch)"
            )
        if self.mixes and not space.interchangeable:
            raise ValueError(
                f"{type(self).__name__} mixes options, and the supernet of {space.id} runs one a "
                "choice, as the next layers fit no other: choose a strategy that tries "
                "architectures one by one (strategy=random estimator=from_scratch)"
            )

    @abstractmethod
    def search(self, problem: Problem, run: Run) -> Answer:
        """Search to the end, resuming where `run` has a checkpoint.

        Afterwards `problem.supernet` holds the trained shared weights.
        """

    @abstractmethod
    def answer(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        """The answer of a search whose checkpoint holds `state`."""


@dataclass
class Run:
    """The run folder's logs and checkpoint. In processes other than the first nothing is written.

    Args:
        folder: the run folder, alike in all processes.
        main: whether this process writes.
        tracker: mirrors the journal.
        resume: continue from the checkpoint where there is one.
        checkpoint_every: weight steps between checkpoints; one more is made at each epoch's end.
        kind: what is run, "search" or "retrain": it names the checkpoint.
    """

    folder: Path
    main: bool
    tracker: Tracker
    resume: bool = False
    checkpoint_every: int = 500
    kind: str = "search"
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._before = 0.0
        self._saved_at, self._saving = -math.inf, 0.0
        if self.main:
            self.metrics = Journal(self.folder / "metrics.jsonl")
            self.timing = Journal(self.folder / "timing.jsonl")

    @classmethod
    def unwritten(cls) -> Run:
        """One that leaves nothing behind."""
        return cls(Path(), main=False, tracker=NoTracker())

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint" / f"{self.kind}.safetensors"

    @property
    def seconds(self) -> float:
        """Time spent since `load`, what came before the checkpoint included."""
        return self._before + time.perf_counter() - self.started

    def log(self, record: dict[str, Any], timing: dict[str, Any] | None = None) -> None:
        """Write a metrics record (deterministic numbers) and its wall-clock companion."""
        if not self.main:
            return
        self.metrics.write(record)
        if timing is not None:
            self.timing.write({"step": record["step"], "epoch": record["epoch"], **timing})
        self.tracker.log(record["step"], flatten({**record, **(timing or {})}))

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint; it remembers how long the journals were."""
        if self.main:
            journals = {"metrics": self.metrics.state, "timing": self.timing.state}
            content = {self.kind: state, "journals": journals, "seconds": self.seconds}
            save_checkpoint(self.checkpoint, content)

    def save_in_time(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the checkpoint unless that would take a large share of the search's time."""
        start = time.perf_counter()
        if start - self._saved_at >= self._saving / SAVING_SHARE:
            self.save(state())
            self._saved_at = time.perf_counter()
            self._saving = self._saved_at - start

    def load(self) -> dict[str, Any] | None:
        """State to resume from, or None to start anew; journal lines past it are cut.

        Raises:
            ValueError: the checkpoint is corrupt or foreign.
        """
        state = None
        journals: dict[str, Any] = {"metrics": 0, "timing": 0}
        if self.resume and self.checkpoint.exists():
            content = load_checkpoint(self.checkpoint)
            if not {self.kind, "journals"} <= set(content):
                raise ValueError(f"{self.checkpoint} is not the checkpoint of a {self.kind}")
            state, journals = content[self.kind], content["journals"]
            self._before = content.get("seconds", 0.0)
        self.started = time.perf_counter()
        if self.main:
            self.metrics.truncate(journals["metrics"])
            self.timing.truncate(journals["timing"])
        return state

    def progress(self, total: int, done: int, text: str) -> tqdm[Any]:
        """A bar on a terminal (log lines tell the story elsewhere); `done` steps are behind."""
        return tqdm(
            total=total, initial=done, desc=text, leave=False, disable=None if self.main else True
        )
