from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from latency.model import macs_cost, params_cost
from latency.sites import trace
from supernet.choice import Architecture
from supernet.mixed_ops.base import MixedOp
from supernet.ops.shuffle import ShuffleUnit
from supernet.spaces.spos import UNITS, Spos

SMALL: dict[str, Any] = {"img_size": 32, "stem_stride": 1, "stages": [(32, 2, 2), (64, 1, 1)]}
# Multiply-accumulates of each candidate of the first block of a stage and of the others, from the
# table that the official code reads (op_flops_dict.pkl).
OFFICIAL = [
    [(13_396_992, 15_805_440, 19_418_112, 13_146_112),
     (7_325_696, 8_931_328, 11_339_776, 12_343_296)],
    [(26_304_768, 28_111_104, 30_820_608, 20_296_192),
     (10_599_680, 11_603_200, 13_108_480, 16_746_240)],
    [(30_670_080, 31_673_600, 33_178_880, 21_199_360),
     (10_317_440, 10_819_200, 11_571_840, 15_899_520)],
]  # fmt: skip
# The searched network that the official README publishes: 323M, 3.5M parameters.
SEARCHED = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)


def everywhere(space: Spos, option: str) -> Architecture:
    return space.architecture({choice.name: option for choice in space.choices})


def test_costs_are_those_of_the_official_code() -> None:
    space = Spos()
    sites = trace(space.build(MixedOp, 1000, False), space.choices, (1, 3, 224, 224))
    macs, params = macs_cost(space.choices, sites), params_cost(space.choices, sites)
    for stage, (first, others) in enumerate(OFFICIAL, start=1):
        rows = [v.tolist() for n, v in macs.per_option.items() if n.startswith(f"stage{stage}_")]
        assert [tuple(row) for row in rows] == [first, *[others] * (len(rows) - 1)]
    numbers = zip(space.choices, SEARCHED, strict=True)
    searched = space.architecture({c.name: c.options[number] for c, number in numbers})
    assert round(macs.of(searched) / 1e6) == 323
    assert 3.5e6 <= params.of(searched) < 3.6e6


def test_there_are_4_to_the_20() -> None:
    space = Spos()
    assert space.size == 4**20 == 1_099_511_627_776
    stages = [choice.name.partition("_")[0] for choice in space.choices]
    assert [stages.count(f"stage{stage}") for stage in (1, 2, 3, 4)] == [4, 4, 8, 4]


def test_sampling_is_uniform() -> None:
    space, generator = Spos(**SMALL), torch.Generator().manual_seed(0)
    assert space.size == 64
    counts: dict[Architecture, int] = {}
    for _ in range(6400):
        architecture = space.sample(generator)
        counts[architecture] = counts.get(architecture, 0) + 1
    assert len(counts) == 64
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5


def test_shapes_along_the_network_at_224() -> None:
    space = Spos()
    network = space.build_network(everywhere(space, "shuffle_3x3"), 1000).eval()
    shapes: list[tuple[int, ...]] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:3])))
    with torch.no_grad():
        x = torch.zeros(1, 3, 224, 224)
        assert network.stem(x).shape == (1, 16, 112, 112)
        assert network.forward_features(x).shape == (1, 1024, 7, 7)
    assert shapes == [(64, 56)] * 4 + [(160, 28)] * 4 + [(320, 14)] * 8 + [(640, 7)] * 4


@pytest.mark.parametrize("option", UNITS)
def test_a_unit_passes_the_even_channels_and_computes_the_others_from_the_odd(option: str) -> None:
    unit = ShuffleUnit(8, 8, UNITS[option][0], 1, UNITS[option][1]).eval()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    y = unit(x)
    assert torch.equal(y[:, :4], x[:, ::2])
    (gradient,) = torch.autograd.grad(y[:, 4:].sum(), x)
    reached = gradient.abs().sum(dim=(0, 2, 3)) > 0
    assert reached.tolist() == [False, True] * 4


@pytest.mark.parametrize("stride", [1, 2])
def test_where_width_changes_all_channels_go_both_ways(stride: int) -> None:
    unit = ShuffleUnit(4, 12, 5, stride, "dpdpdp").eval()
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    y = unit(x)
    assert y.shape == (1, 12, 8 // stride, 8 // stride)
    for part in (y[:, :4], y[:, 4:]):
        (gradient,) = torch.autograd.grad(part.square().sum(), x, retain_graph=True)
        assert (gradient.abs().sum(dim=(0, 2, 3)) > 0).all()


def test_an_option_says_kernel_and_number_of_convolutions() -> None:
    space = Spos(**SMALL)
    for option, kernels in (
        ("shuffle_3x3", [3]), ("shuffle_5x5", [5]), ("shuffle_7x7", [7]), ("xception_3x3", [3] * 3),
    ):  # fmt: skip
        block = space.build_network(everywhere(space, option), 10).blocks[1]
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        assert [m.kernel_size[0] for m in convs if m.groups > 1] == kernels
        assert len([m for m in convs if m.groups == 1]) == max(2, len(kernels))


def test_batch_norms_have_scale_and_shift_in_derived_networks_alone() -> None:
    space = Spos(**SMALL)
    network = space.build_network(everywhere(space, "xception_3x3"), 10)
    for module, affine in ((space.build_supernet(10), False), (network, True)):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(norm.affine == affine for norm in norms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": [(64, 4)]}, r"a stage is \[width, layers, stride\]; got \[64, 4\]"),
        ({"stages": [(64, 4, 2), (64, 4, 2)]}, "must be even and grow.*got 64 after 64"),
        ({"stages": [(16, 4, 2)]}, "got 16 after 16"),
        ({"stages": [(63, 4, 2)]}, "got 63 after 16"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spos(**settings)


def test_the_diagram_is_a_chain_with_every_block() -> None:
    space = Spos(**SMALL)
    options = {"stage1_0": "shuffle_5x5", "stage1_1": "xception_3x3", "stage2_0": "shuffle_3x3"}
    diagram = space.diagram(space.architecture(options))
    assert diagram.nodes == (
        "image", "stem 16", "shuffle 5x5 32 /2", "xception 3x3 32", "shuffle 3x3 64", "head 1024",
    )  # fmt: skip
    assert [edge[:2] for edge in diagram.edges] == [(i, i + 1) for i in range(5)]
