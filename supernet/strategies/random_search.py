"""Random search (Li & Talwalkar 2019, section 4): the baseline that every search has to beat."""

from __future__ import annotations

import torch

from supernet.strategies.base import Problem
from supernet.strategies.trials import Proposals, Trials


class RandomSearch(Trials):
    """Architectures drawn uniformly within budget and limits; the best one is the answer."""

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        sampler = problem.sampler()
        while True:
            yield [sampler.sample(generator) for _ in range(problem.accelerator.num_processes)]
