"""How good an architecture is: what every estimator answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from supernet.choice import Architecture
from supernet.strategies.base import Problem, Run


class Estimate(NamedTuple):
    """What an estimator says.

    Attributes:
        accuracy: in percent, or what the estimator has in its place: larger is better.
        loss: on the same images; of an estimator without one a number that falls as `accuracy`
            rises.
    """

    accuracy: float
    loss: float


class Estimator(ABC):
    """Judges architectures one by one; a strategy with `Trials` asks for each of them once. Of
    several processes each judges others.

    Attributes:
        judge: what an accuracy is of, for people.
        unit: of an accuracy.
        oracle: whether the answer is the truth that searches are judged by.
        judges_parts: whether it judges architectures of other settings of the space, too.
        steps_before: those of its training; the journal counts the architectures on from there.
    """

    judge: ClassVar[str]
    unit: ClassVar[str] = "%"
    oracle: ClassVar[bool] = False
    judges_parts: ClassVar[bool] = False
    steps_before: int = 0

    @abstractmethod
    def prepare(self, problem: Problem, run: Run, saved: Mapping[str, Any] | None) -> None:
        """Get ready, which may take training; called before anything is estimated, and once more
        for another search in the same problem.

        Args:
            saved: the checkpoint of a run that is resumed.

        Raises:
            ValueError: the estimator cannot judge the problem's architectures.
        """

    @abstractmethod
    def estimate(self, architecture: Architecture) -> Estimate:
        """Judge one; the same numbers each time, in each process."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it."""
        return {}
