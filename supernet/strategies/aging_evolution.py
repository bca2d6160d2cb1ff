"""Regularised evolution (Real et al. 2019, algorithm 1): the oldest dies."""

from __future__ import annotations

from collections import deque

import torch

from supernet.strategies.base import Problem
from supernet.strategies.trials import Proposals, Trial, Trials
from supernet.strategies.variation import Variation, pick


class AgingEvolution(Trials):
    """The best of a random sample of the population has a child that differs in one gene; it
    joins the population, and the oldest member leaves.

    Args:
        population: number of architectures alive, 100 in the paper.
        sample_size: of those that compete to be the parent, drawn with replacement; 25 there.
        num_evaluations, seconds: as for all `Trials`.
    """

    def __init__(
        self,
        *,
        population: int,
        sample_size: int,
        num_evaluations: int | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(num_evaluations=num_evaluations, seconds=seconds)
        for name, value in {"population": population, "sample_size": sample_size}.items():
            if value < 1:
                raise ValueError(f"strategy.{name} must be 1 or more; got {value}")
        self.population, self.sample_size = population, sample_size

    @property
    def num_first(self) -> int:
        return self.population

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        variation = Variation(problem, generator)
        alive: deque[Trial] = deque(maxlen=self.population)
        alive.extend((yield [variation.draw() for _ in range(self.population)]))
        while True:
            children = []
            for _ in range(problem.accelerator.num_processes):
                rivals = [pick(alive, generator) for _ in range(self.sample_size)]
                parent = max(rivals, key=lambda trial: trial.reward)
                children.append(variation.mutate_one(parent.architecture))
            alive.extend((yield children))
