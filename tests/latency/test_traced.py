from __future__ import annotations

import pytest
import torch

from latency.memory import PeakMemory
from latency.model import macs_cost, params_cost
from latency.sites import trace
from latency.traced import TracedCost
from supernet.mixed_ops.base import MixedOp
from supernet.spaces.mbconv import MBConv

SPACE = MBConv(
    img_size=16, stem_chs=8, first_chs=8, stages=[(8, 2, 1), (16, 2, 2)], kernels=(3, 5),
    expansions=(3,), head_chs=24,
)  # fmt: skip
SHAPE = (1, 3, 16, 16)


def test_additive_costs_are_those_of_the_traced_networks() -> None:
    """Two ways to count, where both exist."""
    sites = trace(SPACE.build(MixedOp, 10, search=False), SPACE.choices, SHAPE)
    others = [macs_cost(SPACE.choices, sites), params_cost(SPACE.choices, sites)]
    others.append(PeakMemory(SPACE, 10, SHAPE, "float16"))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        architecture = SPACE.sample(generator)
        for other in others:
            cost = TracedCost(other.name, 10, SHAPE, "float16")
            assert (cost.name, cost.unit) == (other.name, other.unit)
            assert cost.of(architecture) == other.of(architecture)


def test_a_cut_forbids_one_architecture() -> None:
    cost, generator = TracedCost("macs", 10, SHAPE), torch.Generator().manual_seed(0)
    first, second = SPACE.sample(generator), SPACE.sample(generator)
    assert first != second and cost.rows(1.0) == []
    row = cost.cut(first, 1.0)
    assert not row.holds(first) and row.holds(second)


def test_another_cost_is_unknown() -> None:
    with pytest.raises(KeyError):
        TracedCost("latency", 10, SHAPE)
