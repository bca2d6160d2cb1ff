"""Uniform sampling among the valid architectures whose cost lies in a range."""

from __future__ import annotations

import math

import numpy as np
import torch

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.space import SearchSpace

_NUM_BINS = 4096


class RangeSampler:
    """Draws uniformly from {valid architectures with low <= cost <= high}.

    Costs are rounded to bins and completions are counted by dynamic programming over the choices,
    which gives an exactly uniform draw from a slightly larger set; what falls outside the range or
    is not valid is rejected. Unlike plain rejection it does not starve when the range holds a tiny
    share of the space.

    Args:
        low, high: in the unit of `cost`.

    Raises:
        ValueError: nothing in the range.
    """

    def __init__(self, space: SearchSpace, cost: AdditiveCost, low: float, high: float) -> None:
        self.space, self.cost, self.low, self.high = space, cost, low, high
        tables = [cost.per_option[choice.name].numpy() for choice in space.choices]
        floor = cost.fixed + sum(float(table.min()) for table in tables)
        span = sum(float(np.ptp(table)) for table in tables) or 1.0
        width = span / _NUM_BINS
        self.steps = [np.rint((t - t.min()) / width).astype(int) for t in tables]
        slack = (len(tables) + 1) / 2  # each rounding is off by half a bin at most
        self.first = max(0, math.floor((low - floor) / width - slack))
        last = math.ceil(min((high - floor) / width + slack, sum(s.max() for s in self.steps)))
        if last < self.first:
            raise ValueError(self._empty())
        self.counts = self._count(last)
        if self.counts[0][last] == 0:
            raise ValueError(self._empty())
        self.last = last

    def _empty(self) -> str:
        return (
            f"no architecture of this space costs {self.low:.6g} to {self.high:.6g} "
            f"{self.cost.unit}; widen the range or change the budget"
        )

    def _count(self, last: int) -> list[np.ndarray]:
        """counts[i][r]: weight of the settings of choices i.. whose bins sum to within reach,
        when r bins are left before the upper end. Scaled to avoid overflow: only ratios matter.
        """
        ends = np.zeros(last + 1)
        ends[: last - self.first + 1] = 1.0  # all choices settled, r bins left
        counts = [ends]
        for steps in reversed(self.steps):
            after = counts[0]
            here = np.zeros_like(after)
            for step in steps:
                if step <= last:
                    here[step:] += after[: last + 1 - step]
            counts.insert(0, here / (here.max() or 1.0))
        return counts

    def sample(self, generator: torch.Generator, max_tries: int = 10_000) -> Architecture:
        """Draw one.

        Raises:
            ValueError: no draw was valid and in range within `max_tries`.
        """
        for _ in range(max_tries):
            architecture = self._draw(generator)
            if self.low <= self.cost.of(architecture) <= self.high and self.space.is_valid(
                architecture
            ):
                return architecture
        raise ValueError(self._empty())

    def _draw(self, generator: torch.Generator) -> Architecture:
        left, options = self.last, {}
        for choice, steps, after in zip(
            self.space.choices, self.steps, self.counts[1:], strict=True
        ):
            ways = torch.tensor([after[left - s] if s <= left else 0.0 for s in steps])
            index = int(torch.multinomial(ways, 1, generator=generator))
            options[choice.name] = choice.options[index]
            left -= int(steps[index])
        return self.space.architecture(options)
