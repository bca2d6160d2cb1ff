"""A strategy: local search (White et al. 2021), which moves to the best neighbour while there is a
better one, and then starts somewhere else."""

import torch

from supernet.strategies.base import Problem
from supernet.strategies.refinement import one_change
from supernet.strategies.trials import Proposals, Trials


class Climbing(Trials):
    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        sampler = problem.sampler()
        while True:
            (lead,) = yield [sampler.sample(generator)]
            climbs = True
            while climbs:
                around = one_change(problem.space, lead.architecture)
                trials = yield [a for a in around if problem.is_feasible(a)]
                best = max([lead, *trials], key=lambda trial: trial.reward)
                climbs, lead = best.reward > lead.reward, best
