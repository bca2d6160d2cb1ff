"""Implied choices that combine others: they make a cost a sum over choices that is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from supernet.choice import Choice
from supernet.space import LinearConstraint

ABSENT = "absent"
Pair = tuple[str, str]
Part = tuple[Choice, tuple[str, ...]]  # a choice, and the options of it that count


@dataclass(frozen=True)
class Combined:
    """An implied choice with an option for every combination of some options of its parts. Where
    one of them has another option, or `needs` has, it is absent.

    Attributes:
        name: of the choice.
        parts: whose options, joined by "_", are an option.
        needs: a further choice on which it depends whether there is anything.
    """

    name: str
    parts: tuple[Part, ...]
    needs: Part | None = None

    @cached_property
    def conditions(self) -> tuple[Part, ...]:
        """What has options that make it absent."""
        found = (*self.parts, *([] if self.needs is None else [self.needs]))
        return tuple(part for part in found if set(part[1]) != set(part[0].options))

    @cached_property
    def combinations(self) -> tuple[tuple[str, ...], ...]:
        return tuple(product(*(options for _, options in self.parts)))

    @cached_property
    def choice(self) -> Choice:
        options = tuple(map("_".join, self.combinations))
        if self.conditions:
            return Choice(self.name, (ABSENT, *options), absent=ABSENT, implied=True)
        return Choice(self.name, options, implied=True)

    def implied(self, options: Mapping[str, str]) -> str:
        """Its option, those of the parts being settled."""
        if any(options[choice.name] not in counting for choice, counting in self.conditions):
            return ABSENT
        return "_".join(options[choice.name] for choice, _ in self.parts)

    def rules(self) -> Iterator[LinearConstraint]:
        """No combination has a part that was not chosen; and there is one where nothing makes it
        absent, and only there."""
        for index, (choice, options) in enumerate(self.parts):
            for option in options:
                having = self._pairs(c for c in self.combinations if c[index] == option)
                yield _row((having, 1.0), ([(choice.name, option)], -1.0), upper=0.0)
        present = self._pairs(self.combinations)
        met = [[(c.name, option) for option in counting] for c, counting in self.conditions]
        if self.needs in self.conditions:
            yield _row((present, 1.0), (met[-1], -1.0), upper=0.0)
        if met:
            yield _row((present, 1.0), *((pairs, -1.0) for pairs in met), lower=1.0 - len(met))

    def share(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Of each option, the parts being independent; shape (num_options,)."""

        def of(part: Part) -> Tensor:
            choice, options = part
            return probabilities[choice.name][[choice.index(option) for option in options]]

        found = probabilities[self.parts[0][0].name].new_ones(1)
        for part in self.parts:
            found = (found[:, None] * of(part)).flatten()
        if self.needs is not None:
            found = found * of(self.needs).sum()
        return torch.cat([(1 - found.sum())[None], found]) if self.conditions else found

    def without(self, excluded: Set[Pair]) -> set[Pair]:
        """The combinations that an excluded option of a part takes out."""
        names = [choice.name for choice, _ in self.parts]
        return {
            (self.name, "_".join(combination))
            for combination in self.combinations
            if not excluded.isdisjoint(zip(names, combination, strict=True))
        }

    def _pairs(self, combinations: Iterable[Sequence[str]]) -> list[Pair]:
        return [(self.name, "_".join(combination)) for combination in combinations]


def _row(
    *terms: tuple[Sequence[Pair], float], lower: float = -math.inf, upper: float = math.inf
) -> LinearConstraint:
    """Bounds of a sum with one factor for each group of pairs."""
    return LinearConstraint({pair: f for pairs, f in terms for pair in pairs}, lower, upper)
