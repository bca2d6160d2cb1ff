"""Accuracy of an architecture that a benchmark has already trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supernet.benchmark import Benchmark
from supernet.choice import Architecture
from supernet.estimators.base import Estimate, Estimator
from supernet.strategies.base import Problem, Run


class Table(Estimator):
    """Looks architectures up: strategies are compared in seconds.

    A search with it reads the truth that others are judged by: it is an oracle, and its runs are
    labelled so.

    Args:
        path: CSV file as for `Benchmark.load`.
        column: of the accuracies, where there are several.
    """

    judge, oracle = "the benchmark's table (oracle)", True

    def __init__(self, path: str | None, column: str | None = None) -> None:
        if path is None:
            raise ValueError(
                "estimator=table needs estimator.path=FILE, a benchmark's table (CSV) with a "
                "column 'architecture' and one of accuracies"
            )
        self.path, self.column = path, column

    def prepare(self, problem: Problem, run: Run, saved: Mapping[str, Any] | None) -> None:
        Benchmark.check(self.path, self.column, problem.space)
        self.space, self.table = problem.space, Benchmark.load(self.path, self.column)

    def estimate(self, architecture: Architecture) -> Estimate:
        """Its loss is the share of errors."""
        accuracy = self.table.look_up(self.space, architecture)
        return Estimate(accuracy, 1 - accuracy / 100)
