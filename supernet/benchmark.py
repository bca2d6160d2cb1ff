"""A tabular benchmark: the accuracy of every architecture of a space, trained on its own.

It judges what a search found, after the search.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supernet.choice import Architecture
from supernet.derive import check_space
from supernet.limits import Cost
from supernet.space import SearchSpace


@dataclass(frozen=True)
class Benchmark:
    """Accuracies by architecture, in the space's own notation (`SearchSpace.to_string`).

    Attributes:
        name: of the column that was read.
        accuracies: in percent.
        path: where they come from.
    """

    name: str
    accuracies: Mapping[str, float]
    path: str

    @classmethod
    def load(cls, path: str | os.PathLike[str], column: str | None = None) -> Benchmark:
        """Read a CSV file with a column `architecture`.

        Args:
            column: of the accuracies; may be left out where there is one other.

        Raises:
            ValueError: not such a file.
        """
        chosen, accuracies = _column(path, column), {}
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                try:
                    accuracies[row["architecture"]] = float(row[chosen])
                except (TypeError, ValueError):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {chosen} is {row[chosen]!r}, no number"
                    ) from None
        if not accuracies:
            raise ValueError(f"{path} holds no architecture")
        return cls(chosen, accuracies, os.fspath(path))

    @staticmethod
    def check(path: str | os.PathLike[str], column: str | None, space: SearchSpace) -> None:
        """Make sure before a search that its answer can be looked up. Of the table, the header
        alone is read.

        Raises:
            ValueError: not such a file, or the space has no notation.
        """
        _column(path, column)
        space.to_string(check_space(space))

    def look_up(self, space: SearchSpace, architecture: Architecture) -> float:
        """The accuracy of an architecture, in percent.

        Raises:
            ValueError: the space has no notation, or the table lacks the architecture.
        """
        text = space.to_string(architecture)
        if text not in self.accuracies:
            raise ValueError(f"{self.path} does not hold {text}: it is of another space")
        return self.accuracies[text]

    def judge(self, space: SearchSpace, architecture: Architecture) -> dict[str, Any]:
        """Accuracy and rank of an architecture, as JSON values.

        The rank is 1 for the best; architectures of equal accuracy have the best of their ranks.

        Raises:
            ValueError: the space has no notation, or the table lacks the architecture.
        """
        accuracy = self.look_up(space, architecture)
        return {
            "name": self.name,
            "accuracy": accuracy,
            "rank": 1 + sum(other > accuracy for other in self.accuracies.values()),
            "of": len(self.accuracies),
            "best": max(self.accuracies.values()),
        }

    def front(self, space: SearchSpace, cost: Cost) -> list[tuple[float, float]]:
        """(cost, accuracy) of the architectures of the table that no other one beats in both, the
        cheapest first.

        Args:
            space: whose restrictions hold; with `from_string`.
            cost: additive over its choices.
        """
        points = []
        for text, accuracy in self.accuracies.items():
            architecture = space.from_string(text)
            if space.is_valid(architecture):
                points.append((cost.of(architecture), accuracy))
        front: list[tuple[float, float]] = []
        for point in sorted(points, key=lambda p: (p[0], -p[1])):
            if not front or point[1] > front[-1][1]:
                front.append(point)
        return front


def _column(path: str | os.PathLike[str], column: str | None) -> str:
    """The column of the accuracies, from the header."""
    if not Path(path).is_file():
        raise ValueError(f"the benchmark's table {os.fspath(path)!r} is not a file")
    with open(path, encoding="utf-8", newline="") as file:
        header = csv.DictReader(file).fieldnames or ()
    names = [name for name in header if name != "architecture"]
    if len(names) == len(header):
        raise ValueError(f"{path} has no column 'architecture'")
    if column is None and len(names) != 1:
        raise ValueError(f"{path} has the columns {', '.join(names)}; name one by column=NAME")
    chosen = names[0] if column is None else column
    if chosen not in names:
        raise ValueError(f"{path} has no column {chosen!r}; valid: {', '.join(names) or 'none'}")
    return chosen


def best_within(front: Sequence[tuple[float, float]], budget: float) -> float:
    """The accuracy that a front reaches for at most `budget`; -inf where all costs more."""
    return max((accuracy for cost, accuracy in front if cost <= budget), default=-math.inf)
