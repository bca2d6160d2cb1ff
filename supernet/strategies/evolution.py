"""Evolution of a population by mutation and crossover (Guo et al. 2020, algorithm 1)."""

from __future__ import annotations

import torch

from supernet.choice import Architecture
from supernet.strategies.base import Problem
from supernet.strategies.trials import Proposals, Trial, Trials
from supernet.strategies.variation import Variation, pick


class Evolution(Trials):
    """The best architectures of all generations are the parents of the next one: some children are
    mutations, some crossovers, the rest is drawn at random. Where it can be, each is new.

    Once-for-All (Cai et al. 2020) evolves in the same way, with its own numbers.

    Args:
        population: number of architectures in a generation.
        num_parents: number of the best that have children.
        num_mutations, num_crossovers: children of each kind in a generation.
        mutation_prob: of each gene of a mutated parent.
        num_evaluations, seconds: as for all `Trials`.
    """

    def __init__(
        self,
        *,
        population: int,
        num_parents: int,
        num_mutations: int,
        num_crossovers: int,
        mutation_prob: float,
        num_evaluations: int | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(num_evaluations=num_evaluations, seconds=seconds)
        for name, value in {"population": population, "num_parents": num_parents}.items():
            if value < 1:
                raise ValueError(f"strategy.{name} must be 1 or more; got {value}")
        if min(num_mutations, num_crossovers) < 0 or num_mutations + num_crossovers > population:
            raise ValueError(
                f"strategy.num_mutations={num_mutations} and strategy.num_crossovers="
                f"{num_crossovers} must be 0 or more, and together at most strategy.population="
                f"{population}"
            )
        if not 0 < mutation_prob <= 1:
            raise ValueError(
                f"strategy.mutation_prob must be above 0 and at most 1; got {mutation_prob}"
            )
        self.population, self.num_parents = population, num_parents
        self.num_mutations, self.num_crossovers = num_mutations, num_crossovers
        self.mutation_prob = mutation_prob

    @property
    def num_first(self) -> int:
        return self.population

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        variation = Variation(problem, generator)
        seen: dict[Architecture, None] = {}
        parents: list[Trial] = []

        def mutant() -> Architecture:
            parent = pick(parents, generator).architecture
            return variation.mutate(parent, self.mutation_prob)

        def crossed() -> Architecture:
            mother, father = (pick(parents, generator).architecture for _ in range(2))
            return variation.cross(mother, father)

        num_random = self.population
        while True:
            makers = [variation.draw] * num_random
            if parents:
                makers = [mutant] * self.num_mutations + [crossed] * self.num_crossovers + makers
            generation = []
            for make in makers:
                generation.append(variation.unseen(make, seen))
                seen[generation[-1]] = None
            trials = {trial.architecture: trial for trial in [*parents, *(yield generation)]}
            best = sorted(trials.values(), key=lambda trial: trial.reward, reverse=True)
            parents = best[: self.num_parents]
            num_random = self.population - self.num_mutations - self.num_crossovers
