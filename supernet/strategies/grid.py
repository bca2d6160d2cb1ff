"""Grid search: everything, in order."""

from __future__ import annotations

from itertools import chain, product

import torch

from supernet.strategies.base import Problem
from supernet.strategies.trials import Proposals, Trials


class Grid(Trials):
    """Every architecture within budget and limits, the last choice changing fastest."""

    @property
    def is_finite(self) -> bool:
        return True

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        batch = []
        for ways in product(*problem.space.ways()):
            architecture = problem.space.architecture(dict(chain.from_iterable(ways)))
            if problem.is_feasible(architecture):
                batch.append(architecture)
            if len(batch) == problem.accelerator.num_processes:
                yield batch
                batch = []
        if batch:
            yield batch
