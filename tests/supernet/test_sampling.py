import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from latency.model import AdditiveCost
from supernet.derive import reachable
from supernet.sampling import RangeSampler
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
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


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (100.0, 200.0)])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    space = NasBench201()
    with pytest.raises(ValueError, match=f"costs {low:.6g} to {high:.6g} ms"):
        RangeSampler(space, make_cost(space), low, high).sample(torch.Generator())
