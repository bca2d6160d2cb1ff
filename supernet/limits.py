"""Upper bounds on the costs of an architecture, and what a cost tells an integer program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from supernet.choice import Architecture
from supernet.space import LinearConstraint


class Cost(Protocol):
    """A number of an architecture that can be limited: additive or not.

    Attributes:
        name: as in `objective.limits`.
        unit: of all its numbers.
    """

    name: str
    unit: str

    def of(self, architecture: Architecture) -> float:
        """The cost, exactly."""

    def rows(self, upper: float) -> list[LinearConstraint]:
        """Rows that every architecture of a cost of at most `upper` meets."""

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """One more such row, broken by `architecture`, which costs more than `upper`."""


@dataclass(frozen=True)
class Limit:
    """cost <= upper."""

    cost: Cost
    upper: float

    def holds(self, architecture: Architecture) -> bool:
        return self.cost.of(architecture) <= self.upper

    def __str__(self) -> str:
        return f"{self.cost.name} <= {figure(self.upper)} {self.cost.unit}"


def figure(value: float) -> str:
    """Six digits, or all of a large count: a bound that is copied must not be rounded down."""
    return f"{value:.6g}" if value < 1e6 else f"{value:.0f}"


class Membership:
    """As a cost: 1 for the architectures of a collection, 0 for all others."""

    name, unit = "membership", "of a collection"

    def __init__(self, architectures: Collection[Architecture]) -> None:
        self.architectures = architectures

    def of(self, architecture: Architecture) -> int:
        return int(architecture in self.architectures)

    def rows(self, upper: float) -> list[LinearConstraint]:
        return [] if upper >= 1 else [self.cut(a, upper) for a in self.architectures]

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """Forbids one architecture."""
        return LinearConstraint(dict.fromkeys(architecture, 1.0), upper=len(list(architecture)) - 1)


class Disagreement:
    """As a cost: how many of some settled choices an architecture settles in another way.

    Args:
        settled: by choice, the options that are left to it.
    """

    name, unit = "disagreement", "choices"

    def __init__(self, settled: Mapping[str, Collection[str]]) -> None:
        self.settled = dict(settled)

    def of(self, architecture: Architecture) -> int:
        return sum(architecture[name] not in options for name, options in self.settled.items())

    def rows(self, upper: float) -> list[LinearConstraint]:
        terms = {(name, o): 1.0 for name, options in self.settled.items() for o in options}
        return [LinearConstraint(terms, lower=len(self.settled) - upper)]

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """The row that forbids all that are above."""
        return self.rows(upper)[0]
