"""Random search (Li & Talwalkar 2019, section 4): the baseline that every search has to beat."""

from __future__ import annotations

import torch

from supernet.estimators.base import Estimator
from supernet.strategies.base import Problem, Run
from supernet.strategies.trials import Proposals, Trials


class RandomSearch(Trials):
    """Architectures drawn uniformly within budget and limits; the best one is the answer.

    Args:
        prefilter: an estimator that costs little next to the problem's own: of `num_drawn`
            architectures the one that it likes best is proposed.
        num_drawn: for each that is proposed.
        num_evaluations, seconds: as for all `Trials`.
    """

    def __init__(
        self,
        *,
        prefilter: Estimator | None = None,
        num_drawn: int = 1,
        num_evaluations: int | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(num_evaluations=num_evaluations, seconds=seconds)
        if num_drawn < 1 or (num_drawn > 1) != (prefilter is not None):
            raise ValueError(
                f"strategy.num_drawn={num_drawn} must be 1 without a strategy.prefilter, and 2 or "
                "more with one"
            )
        self.prefilter, self.num_drawn = prefilter, num_drawn

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        sampler, prefilter = problem.sampler(), self.prefilter
        if prefilter is not None:
            prefilter.prepare(problem, Run.unwritten(), None)
        while True:
            batch = []
            for _ in range(problem.accelerator.num_processes):
                drawn = [sampler.sample(generator) for _ in range(self.num_drawn)]
                if prefilter is not None:
                    drawn.sort(key=lambda a: prefilter.estimate(a).accuracy, reverse=True)
                batch.append(drawn[0])
            yield batch
