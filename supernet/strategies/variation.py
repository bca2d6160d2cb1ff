"""Mutation and crossover, within budget and limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from supernet.choice import Architecture, Choice
from supernet.space import SearchSpace, Way
from supernet.strategies.base import Problem

TRIES = 100  # to find one that is within budget and limits
NEW_TRIES = 10  # to find one that is new, as in the official code of SPOS

T = TypeVar("T")


def pick(items: Sequence[T], generator: torch.Generator) -> T:
    """One of them, uniformly."""
    return items[int(torch.randint(len(items), (1,), generator=generator))]


def tied_groups(space: SearchSpace) -> list[Sequence[Way]]:
    """The groups of several choices (`SearchSpace.ways`) whose choices are genes themselves."""
    genes = {gene.name for gene in space.genes}
    return [
        group
        for group in space.ways()
        if len(group[0]) > 1 and all(name in genes for name, _ in group[0])
    ]


def allowed_options(space: SearchSpace, gene: Choice) -> tuple[str, ...]:
    """The options of a gene, without those that are excluded of a choice."""
    own = space.by_name.get(gene.name)
    return gene.options if own is None else space.allowed(own)


class Variation:
    """Draws, mutates and crosses architectures of a problem.

    Genes (`SearchSpace.genes`) change one by one. Where the space's constraints tie the choice to
    others of its group (`SearchSpace.ways`), as few of these change with it as have to. What ends
    up outside budget and limits is tried again, and after `TRIES` drawn at random instead.
    """

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem, self.space, self.generator = problem, problem.space, generator
        self._sampler = problem.sampler()
        self._options = {g.name: allowed_options(self.space, g) for g in self.space.genes}
        self._free = [name for name, options in self._options.items() if len(options) > 1]
        self._tied = {n: group for group in tied_groups(self.space) for n, _ in group[0]}

    def draw(self) -> Architecture:
        """One of all, uniformly."""
        return self._sampler.sample(self.generator)

    def mutate_one(self, parent: Architecture) -> Architecture:
        """Change one gene, to another of its options (Real et al. 2019, section 3.2)."""
        if not self._free:
            return parent
        return self._within(lambda: self._change(parent, [pick(self._free, self.generator)]))

    def mutate(self, parent: Architecture, probability: float) -> Architecture:
        """Give each gene another option with a probability (Guo et al. 2020, section 3.3)."""

        def change() -> Architecture | None:
            drawn = torch.rand(len(self._free), generator=self.generator) < probability
            names = [name for name, yes in zip(self._free, drawn.tolist(), strict=True) if yes]
            return self._change(parent, names)

        return self._within(change)

    def cross(self, mother: Architecture, father: Architecture) -> Architecture:
        """Take each gene from one of the two; tied choices come from the same one."""

        def mix() -> Architecture:
            if self._tied:
                parents = (dict(mother), dict(father))
                chosen: dict[str, str] = {}
                for group in self.space.ways():
                    source = pick(parents, self.generator)
                    chosen |= {name: source[name] for name, _ in group[0]}
                return self.space.architecture(chosen)
            genes = [self.space.encode(parent) for parent in (mother, father)]
            return self.space.decode({
                gene.name: pick(genes, self.generator)[gene.name] for gene in self.space.genes
            })  # fmt: skip

        return self._within(mix)

    def unseen(
        self, make: Callable[[], Architecture], seen: Collection[Architecture]
    ) -> Architecture:
        """One that `make` gives and that was not seen; after `NEW_TRIES` any that it gives."""
        for _ in range(NEW_TRIES):
            found = make()
            if found not in seen:
                break
        return found

    def _within(self, make: Callable[[], Architecture | None]) -> Architecture:
        for _ in range(TRIES):
            found = make()
            if found is not None and self.problem.is_feasible(found):
                return found
        return self.draw()

    def _change(self, parent: Architecture, names: Sequence[str]) -> Architecture | None:
        """Give genes another option each; None where a tied choice has no way to have it."""
        genes = self.space.encode(parent)
        for name in names:
            others = [option for option in self._options[name] if option != genes[name]]
            genes[name] = pick(others, self.generator)
            if name in self._tied:
                group = self._tied[name]
                ways = [dict(way) for way in group if (name, genes[name]) in way]
                if not ways:
                    return None
                changes = [sum(genes[n] != option for n, option in way.items()) for way in ways]
                fewest = min(changes)
                nearest = [w for w, n in zip(ways, changes, strict=True) if n == fewest]
                genes |= pick(nearest, self.generator)
        return self.space.decode(genes)
