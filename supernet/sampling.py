"""Uniform sampling among the valid architectures whose cost lies in a range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.limits import Cost, Limit, figure
from supernet.space import SearchSpace

_NUM_BINS = (4096, 512, 64, 24)  # of each axis, by the number of axes


class Sampler(Protocol):
    def sample(self, generator: torch.Generator) -> Architecture:
        """Draw one.

        Raises:
            ValueError: none was found.
        """


def make_sampler(
    space: SearchSpace, cost: Cost, low: float, high: float, limits: Sequence[Limit] = ()
) -> Sampler:
    """What draws uniformly from {valid architectures with low <= cost <= high and within the
    limits}; where costs are not additive, by rejection.

    Raises:
        ValueError: nothing in the range.
    """
    if isinstance(cost, AdditiveCost):
        return RangeSampler(space, cost, low, high, limits)
    return RejectionSampler(space, cost, low, high, limits)


class RejectionSampler:
    """Draws uniformly from the valid architectures until one is within all bounds.

    Args:
        low, high: in the unit of `cost`.
        limits: on further costs.
    """

    def __init__(
        self, space: SearchSpace, cost: Cost, low: float, high: float, limits: Sequence[Limit] = ()
    ) -> None:
        self.space, self.cost, self.low, self.high = space, cost, low, high
        self.limits = tuple(limits)

    def sample(self, generator: torch.Generator, max_tries: int = 1000) -> Architecture:
        """Draw one.

        Raises:
            ValueError: no draw was in range within `max_tries`.
        """
        costs = list[float]()
        for _ in range(max_tries):
            architecture = self.space.sample(generator)
            costs.append(self.cost.of(architecture))
            if self.low <= costs[-1] <= self.high and all(
                limit.holds(architecture) for limit in self.limits
            ):
                return architecture
        limits = "".join(f" and has {limit}" for limit in self.limits)
        raise ValueError(
            f"of {max_tries} architectures drawn from this space none costs {figure(self.low)} to "
            f"{figure(self.high)} {self.cost.unit}{limits}; they cost {figure(min(costs))} to "
            f"{figure(max(costs))}: widen the range or change the budget"
        )


class RangeSampler:
    """Draws uniformly from {valid architectures with low <= cost <= high and within the limits}.

    Additive costs are rounded to bins, an axis each, and completions are counted by dynamic
    programming over the groups of choices (`SearchSpace.ways`), which gives an exactly uniform draw
    from a slightly larger set; what falls outside a range or is not valid is rejected. Unlike plain
    rejection it does not starve when the range holds a tiny share of the space.

    Args:
        low, high: in the unit of `cost`.
        limits: on further costs.

    Raises:
        ValueError: nothing in the range.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: AdditiveCost,
        low: float,
        high: float,
        limits: Sequence[Limit] = (),
    ) -> None:
        self.space, self.cost, self.low, self.high = space, cost, low, high
        self.limits = tuple(limits)
        self.rows = [
            row
            for limit in limits
            if not isinstance(limit.cost, AdditiveCost)
            for row in limit.cost.rows(limit.upper)
        ]
        too_much = {p for row in self.rows for p, value in row.terms.items() if value > row.upper}
        self.groups = [
            [way for way in group if too_much.isdisjoint(way)] for group in space.ways()
        ]
        if not all(self.groups):
            raise ValueError(self._empty())
        additive = [(x.cost, x.upper) for x in limits if isinstance(x.cost, AdditiveCost)]
        axes = [(cost, low, high), *((other, -math.inf, upper) for other, upper in additive)]
        binned = [self._bin(*axis, num_bins=_NUM_BINS[len(axes) - 1]) for axis in axes]
        # by group, (num_ways, num_axes): bins that each way takes
        by_group = zip(*(steps for steps, _, _ in binned), strict=True)
        self.steps = [np.stack(steps, axis=1) for steps in by_group]
        first, self.last = [b[1] for b in binned], [b[2] for b in binned]
        if any(end < start for start, end in zip(first, self.last, strict=True)):
            raise ValueError(self._empty())
        self.counts = self._count(first)
        if self.counts[0][tuple(self.last)] == 0:
            raise ValueError(self._empty())

    def _bin(
        self, cost: AdditiveCost, low: float, high: float, num_bins: int
    ) -> tuple[list[np.ndarray], int, int]:
        """Bins of every way, and the first and last bin of the range. What implied choices cost is
        not counted: the range is wider by that.
        """
        costs = {
            (choice.name, option): value
            for choice in self.space.choices
            for option, value in zip(
                choice.options, cost.per_option[choice.name].tolist(), strict=True
            )
        }
        tables = [
            np.array([math.fsum(costs[pair] for pair in way) for way in group])
            for group in self.groups
        ]
        implied = [c for c in self.space.choices if c.implied]
        ends = [[costs[c.name, o] for o in self.space.allowed(c)] for c in implied]
        low, high = low - math.fsum(map(max, ends)), high - math.fsum(map(min, ends))
        floor = cost.fixed + sum(float(table.min()) for table in tables)
        span = sum(float(np.ptp(table)) for table in tables) or 1.0
        width = max(min(high - floor, span), 1e-9 * span) / num_bins  # fine where the range is low
        steps = [np.rint((t - t.min()) / width).astype(int) for t in tables]
        slack = (len(tables) + 1) / 2  # each rounding is off by half a bin at most
        first = math.floor(max((low - floor) / width - slack, 0.0))
        last = math.ceil(min((high - floor) / width + slack, sum(s.max() for s in steps)))
        return steps, first, last

    def _empty(self) -> str:
        limits = "".join(f" and has {limit}" for limit in self.limits)
        return (
            f"no architecture of this space costs {self.low:.6g} to {self.high:.6g} "
            f"{self.cost.unit}{limits}; widen the range or change the budget"
        )

    def _count(self, first: list[int]) -> list[np.ndarray]:
        """counts[i][r]: weight of the settings of groups i.. whose bins sum to within reach,
        when r bins (of each axis) are left before the upper end. Scaled to avoid overflow: only
        ratios matter.
        """
        ends = np.zeros([last + 1 for last in self.last])  # all groups settled, r bins left
        ends[tuple(slice(b - a + 1) for a, b in zip(first, self.last, strict=True))] = 1.0
        counts = [ends]
        for steps in reversed(self.steps):
            after = counts[0]
            here = np.zeros_like(after)
            for step in steps:
                if (step <= self.last).all():
                    source = tuple(slice(end) for end in np.array(after.shape) - step)
                    here[tuple(slice(n, None) for n in step)] += after[source]
            counts.insert(0, here / (here.max() or 1.0))
        return counts

    def sample(self, generator: torch.Generator, max_tries: int = 10_000) -> Architecture:
        """Draw one.

        Raises:
            ValueError: no draw was valid and in range within `max_tries`.
        """
        for _ in range(max_tries):
            architecture = self._draw(generator)
            if (
                self.low <= self.cost.of(architecture) <= self.high
                and self.space.is_valid(architecture)
                and all(row.holds(architecture) for row in self.rows)
                and self._is_within(architecture)
            ):
                return architecture
        raise ValueError(self._empty())

    def _is_within(self, architecture: Architecture) -> bool:
        """Within the limits; a combination that is not is known from then on."""
        broken = next((limit for limit in self.limits if not limit.holds(architecture)), None)
        if broken is not None and not isinstance(broken.cost, AdditiveCost):
            self.rows.append(broken.cost.cut(architecture, broken.upper))
        return broken is None

    def _draw(self, generator: torch.Generator) -> Architecture:
        left, drawn = np.array(self.last), dict[str, str]()
        for group, steps, after in zip(self.groups, self.steps, self.counts[1:], strict=True):
            ways = [after[tuple(left - s)] if (s <= left).all() else 0.0 for s in steps]
            index = int(torch.multinomial(torch.tensor(ways), 1, generator=generator))
            drawn.update(group[index])
            left = left - steps[index]
        return self.space.architecture(drawn)
