import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from latency.memory import PeakMemory
from latency.model import AdditiveCost
from latency.traced import TracedCost
from supernet.derive import check_limits, reachable
from supernet.limits import Limit
from supernet.sampling import RangeSampler, make_sampler
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nas_rl import NasRL
from supernet.spaces.nasbench201 import NasBench201


def make_cost(space: SearchSpace, seed: int = 0) -> AdditiveCost:
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        for c in space.choices
    }
    return AdditiveCost(space.choices, 0.5, vectors, "latency", "ms")


def in_range(space: SearchSpace, cost: AdditiveCost, low: float, high: float) -> set:
    found = set()
    for options in itertools.product(*(c.options for c in space.choices)):
        names = [c.name for c in space.choices]
        architecture = space.architecture(dict(zip(names, options, strict=True)))
        if low <= cost.of(architecture) <= high and space.is_valid(architecture):
            found.add(architecture)
    return found


@pytest.mark.parametrize(
    ("space", "share"),
    [
        (MBConv(stages=[[24, 3, 2]], kernels=[3, 5], expansions=[3, 6]), 0.5),
        (NasBench201(), 0.2),
    ],
)
def test_uniform_over_the_range(space: SearchSpace, share: float) -> None:
    cost = make_cost(space)
    low, high = reachable(space, cost)
    low, high = low + share * (high - low), low + (share + 0.05) * (high - low)
    members = in_range(space, cost, low, high)
    assert 5 < len(members) < 400
    sampler, generator = RangeSampler(space, cost, low, high), torch.Generator().manual_seed(0)
    counts = Counter(sampler.sample(generator) for _ in range(30 * len(members)))
    assert set(counts) == members
    assert chisquare([counts[a] for a in members]).pvalue > 1e-3


def test_finds_a_range_that_holds_a_tiny_share_of_a_huge_space() -> None:
    space = MBConv()
    cost = make_cost(space, 3)
    top = 0.5 + sum(v.max().item() for v in cost.per_option.values())
    sampler = RangeSampler(space, cost, 0.97 * top, 0.98 * top)
    generator = torch.Generator().manual_seed(0)
    drawn = {sampler.sample(generator) for _ in range(20)}
    assert len(drawn) == 20
    assert all(0.97 * top <= cost.of(a) <= 0.98 * top for a in drawn)


@pytest.mark.parametrize("num_limits", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_uniform_within_limits_and_without_what_is_excluded(num_limits: int) -> None:
    space = NasBench201()
    space.exclude(["*=nor_conv_1x1", "edge_0_1=none"])
    costs = [make_cost(space, seed) for seed in range(num_limits + 1)]
    ends = [reachable(space, cost) for cost in costs]
    (low, high), *others = ends
    uppers = [a + 0.55 * (b - a) for a, b in others]
    limits = [Limit(cost, upper) for cost, upper in zip(costs[1:], uppers, strict=True)]
    low, high = low + 0.3 * (high - low), low + (0.35 if num_limits < 3 else 0.4) * (high - low)
    members = {
        a
        for a in in_range(space, costs[0], low, high)
        if all(cost.of(a) <= upper for cost, upper in zip(costs[1:], uppers, strict=True))
    }
    assert 5 < len(members) < 400
    sampler = RangeSampler(space, costs[0], low, high, limits)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sampler.sample(generator) for _ in range(30 * len(members)))
    assert set(counts) == members
    assert chisquare([counts[a] for a in members]).pvalue > 1e-3


def test_two_tight_limits_at_once_do_not_starve() -> None:
    """Costs that go against each other: few draws would meet both by chance."""
    space = MBConv()
    cost, other = make_cost(space, 3), make_cost(space, 4)
    low, high = reachable(space, cost)
    bound = low + 0.15 * (high - low)
    upper = reachable(space, other, [Limit(cost, bound)])[0] * 1.05
    sampler = RangeSampler(space, cost, 0.0, bound, [Limit(other, upper)])
    generator = torch.Generator().manual_seed(0)
    drawn = {sampler.sample(generator, max_tries=200) for _ in range(10)}
    assert len(drawn) > 5
    assert all(cost.of(a) <= bound and other.of(a) <= upper for a in drawn)


def test_uniform_within_a_limit_that_is_no_sum() -> None:
    space = NasBench201(widths=(4,), num_cells=1, img_size=4)
    space.exclude(["*=nor_conv_1x1", "*=none", "edge_0_1=skip_connect"])
    memory = PeakMemory(space, 10, (1, 3, 4, 4))
    cost = make_cost(space)
    low, high = reachable(space, cost)
    every = in_range(space, cost, low, low + 0.35 * (high - low))
    upper = sorted({memory.of(a) for a in every})[0]
    members = {a for a in every if memory.of(a) <= upper}
    assert 5 < len(members) < len(every) < 200
    fresh = PeakMemory(space, 10, (1, 3, 4, 4))
    sampler = RangeSampler(space, cost, low, low + 0.35 * (high - low), [Limit(fresh, upper)])
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sampler.sample(generator) for _ in range(30 * len(members)))
    assert set(counts) == members
    assert chisquare([counts[a] for a in members]).pvalue > 1e-3


def test_an_empty_range_names_the_limits() -> None:
    space = NasBench201()
    cost, other = make_cost(space), make_cost(space, 1)
    with pytest.raises(ValueError, match="costs 0 to 9 ms and has latency <= 0.25 ms; widen"):
        RangeSampler(space, cost, 0.0, 9.0, [Limit(other, 0.25)])


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (100.0, 200.0)])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    space = NasBench201()
    with pytest.raises(ValueError, match=f"costs {low:.6g} to {high:.6g} ms"):
        RangeSampler(space, make_cost(space), low, high).sample(torch.Generator())


# ---- costs that are no sum


def members_of(space: NasRL, cost: TracedCost, low: float, high: float) -> set:
    space.exclude([f"{side}_*={size}" for side in ("height", "width") for size in (3, 5)])
    space.exclude(["width_*=7", "filters_*=36", "filters_*=48"])
    found = set()
    for options in itertools.product(*(space.allowed(c) for c in space.choices)):
        names = [c.name for c in space.choices]
        architecture = space.architecture(dict(zip(names, options, strict=True)))
        if low <= cost.of(architecture) <= high:
            found.add(architecture)
    return found


def test_uniform_over_the_range_of_a_cost_that_is_no_sum() -> None:
    space, cost = NasRL(num_layers=2), TracedCost("params", 10, (1, 3, 8, 8))
    memory = TracedCost("peak_memory", 10, (1, 3, 8, 8))
    members = members_of(space, cost, 1500, 6000)
    upper = sorted({memory.of(a) for a in members})[-2]
    limits = [Limit(memory, upper)]
    within = {a for a in members if memory.of(a) <= upper}
    assert 5 < len(within) < len(members) < 32
    sampler = make_sampler(space, cost, 1500, 6000, limits)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sampler.sample(generator) for _ in range(30 * len(within)))
    assert set(counts) == within
    assert chisquare([counts[a] for a in within]).pvalue > 1e-3
    check_limits(space, cost, 6000, limits)


def test_what_no_draw_meets_is_refused_with_what_was_drawn() -> None:
    space, cost = NasRL(num_layers=2), TracedCost("params", 10, (1, 3, 8, 8))
    costs = sorted(cost.of(a) for a in members_of(space, cost, 0, 1e9))
    sampler = make_sampler(space, cost, 0.0, 100.0)
    drawn = f"of 1000 architectures .* none costs 0 to 100 parameters; .* {costs[0]} to {costs[-1]}"
    with pytest.raises(ValueError, match=drawn):
        sampler.sample(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="none costs 0 to 100 parameters"):
        check_limits(space, cost, 100.0, ())
