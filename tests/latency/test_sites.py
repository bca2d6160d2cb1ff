from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from latency.sites import Site, trace, trace_architecture, trace_compiled
from latency.table import OpKey
from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import MixedOp, Searchable, Weights
from supernet.network import Block, Network
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.mnasnet import MnasNet
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos

SPACES = [
    NasBench201(widths=(4, 8), num_cells=2, img_size=8),
    MBConv(
        img_size=16,
        stem_chs=8,
        first_chs=8,
        stages=[(8, 2, 1), (16, 2, 2)],
        kernels=(3, 5),
        expansions=(3,),
        head_chs=24,
    ),
    Darts(width=4, num_cells=3, img_size=8),
    Spos(img_size=16, stem_chs=8, stages=[(16, 2, 2)], head_chs=16),
    ENASMacro(width=4, num_layers=4, img_size=8),
    MnasNet(
        img_size=8,
        stem_chs=4,
        stages=[(4, 1, 1), (8, 2, 2)],
        kernels=(3,),
        expansions=(3,),
        head_chs=8,
    ),
]
CHOICE = Choice("edge", ("wide", "skip"))


def trace_deployed(space: SearchSpace, batch: int = 1) -> list[Site]:
    network = space.build(MixedOp, 10, search=False)
    return trace(network, space.choices, (batch, 3, space.img_size, space.img_size))


def chosen(sites: list[Site], architecture: Architecture) -> list[Site]:
    pairs = {(None, None), *architecture}
    return [site for site in sites if (site.choice, site.option) in pairs]


def make_network(block: nn.Module) -> Network:
    return Network(
        stem=nn.Conv2d(3, 4, 3, padding=1), stem_stride=1, blocks=[Block(block, 4, 1)],
        final=nn.ReLU(), num_features=4, num_classes=2, in_chans=3, img_size=6,
    )  # fmt: skip


class Pair(Searchable):
    """Holds a searchable position, a fixed layer in a list, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        candidates = {"wide": lambda: nn.Conv2d(4, 4, 5, padding=2), "skip": nn.Identity}
        self.mixed = MixedOp(CHOICE, candidates)
        self.fixed = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])
        self.twice = nn.Conv2d(4, 4, 3, groups=4)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, 4, H, W) -> (N, 4, H - 4, W - 4)."""
        x = self.fixed[0](self.mixed(x, weights))
        return self.twice(self.twice(x))


def test_sites_of_a_network_counted_by_hand() -> None:
    sites = trace(make_network(Pair()), [CHOICE], (2, 3, 6, 6))
    rows = [
        (s.choice, s.option, type(s.module).__name__, s.key.in_chs, s.key.out_chs, s.key.stride,
         s.key.resolution, s.macs, s.params)
        for s in sites
    ]  # fmt: skip
    assert rows == [
        (None, None, "Conv2d", 3, 4, 1, 6, 36 * 3 * 4 * 9, 3 * 4 * 9 + 4),
        ("edge", "wide", "Conv2d", 4, 4, 1, 6, 36 * 4 * 4 * 25, 4 * 4 * 25 + 4),
        ("edge", "skip", "Identity", 4, 4, 1, 6, 0, 0),
        (None, None, "Sequential", 4, 4, 1, 6, 36 * 4 * 4, 4 * 4 + 4),
        (None, None, "Conv2d", 4, 4, 2, 6, 16 * 4 * 9, 4 * 9 + 4),
        (None, None, "Conv2d", 4, 4, 2, 4, 4 * 4 * 9, 0),
        (None, None, "ReLU", 4, 4, 1, 2, 0, 0),
        (None, None, "SelectAdaptivePool2d", 4, 4, 2, 2, 0, 0),
        (None, None, "Linear", 4, 2, 1, 1, 8, 10),
    ]
    assert {site.input_shapes[0][0] for site in sites} == {2}


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_macs_and_params_are_those_of_the_derived_network(space: SearchSpace) -> None:
    sites = trace_deployed(space, batch=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        architecture = space.sample(generator)
        network = space.build_network(architecture, 10)
        ours = chosen(sites, architecture)
        assert sum(s.params for s in ours) == sum(p.numel() for p in network.parameters())
        assert sum(s.macs for s in ours) == count_macs(network, space.img_size)


def count_macs(network: nn.Module, img_size: int) -> int:
    """Output positions times the weights that each of them reads."""
    total = 0

    def hook(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    network.eval()(torch.zeros(1, 3, img_size, img_size))
    return total


def test_every_position_of_nasbench201_is_a_site() -> None:
    space = SPACES[0]
    sites = trace_deployed(space)
    num_cells = 2 * 2
    for choice in space.choices:
        for option in choice.options:
            found = [s for s in sites if (s.choice, s.option) == (choice.name, option)]
            names = [type(s.module).__name__ for s in found]
            if option.startswith("nor_conv"):  # in two parts: derived cells may share the ReLU
                assert names == ["ReLU", "Sequential"] * num_cells
            else:
                assert len(names) == num_cells
    fixed = [type(s.module).__name__ for s in sites if s.choice is None]
    assert fixed.count("Sum") == 2 * num_cells
    assert fixed.count("ResidualReduction") == 1
    assert fixed[0] == "Sequential" and fixed[-2:] == ["SelectAdaptivePool2d", "Linear"]
    assert len(fixed) == 2 * num_cells + 1 + 4
    inputs = {len(s.input_shapes) for s in sites if type(s.module).__name__ == "Sum"}
    assert inputs == {2, 3}
    assert len({s.key for s in sites if type(s.module).__name__ == "Sum"}) == 4


def test_candidates_never_cost_the_same_operations() -> None:
    for space in SPACES:
        sites = trace_deployed(space)
        for choice in space.choices:
            keys: dict[str | None, set[OpKey]] = {}
            for site in sites:
                if site.choice == choice.name:
                    keys.setdefault(site.option, set()).add(site.key)
            assert set(keys) == (set() if choice.free else set(choice.options) - {choice.absent})
            for one, two in itertools.combinations(keys.values(), 2):
                assert one != two  # they may have a part in common, a ReLU


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_the_network_is_left_as_it_was(space: SearchSpace) -> None:
    network = space.build(MixedOp, 10, search=False)
    network.blocks[0].eval()  # a mixture of modes
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trace(network, space.choices, (2, 3, space.img_size, space.img_size))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in network.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


class TakesNumber(nn.Module):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x * factor


class PassesNumber(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.scale = TakesNumber()

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return self.scale(super().forward(x, weights), 2.0)


def test_a_layer_that_takes_more_than_tensors_is_refused_and_nothing_is_left_behind() -> None:
    network = make_network(PassesNumber()).train()
    with pytest.raises(ValueError, match="TakesNumber cannot be measured .*'Tensor', 'float'"):
        trace(network, [CHOICE], (1, 3, 6, 6))
    assert all(module.training for module in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


# ---- one derived network


def test_the_operations_of_an_mbconv_network_are_the_supernets() -> None:
    space = SPACES[1]
    sites = trace_deployed(space)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        architecture = space.sample(generator)
        shape = (1, 3, space.img_size, space.img_size)
        found = trace_architecture(space, architecture, 10, shape)
        expected = [(s.key, s.macs, s.params, s.output_shape) for s in chosen(sites, architecture)]
        assert [(s.key, s.macs, s.params, s.output_shape) for s in found] == expected
        assert {(s.choice, s.option) for s in found} == {(None, None)}


def test_a_compiled_cell_runs_what_it_needs_once() -> None:
    """Counted by hand: node 1 has no output, nodes 0 and 2 are equal, and two pools read them."""
    space = NasBench201(widths=(4,), num_cells=1, img_size=8)
    cell = "|nor_conv_3x3~0|+|skip_connect~0|none~1|+|avg_pool_3x3~0|none~1|avg_pool_3x3~2|"
    sites = trace_architecture(space, space.from_string(cell), 10, (2, 3, 8, 8), compiled=True)
    names = Counter(type(site.module).__name__ for site in sites[1:-3])  # without stem and head
    assert names == {"AvgPool2d": 1, "FusedSum": 1}

    cell = "|nor_conv_1x1~0|+|nor_conv_3x3~0|none~1|+|avg_pool_3x3~0|nor_conv_3x3~1|skip_connect~2|"
    sites = trace_architecture(space, space.from_string(cell), 10, (2, 3, 8, 8), compiled=True)
    names = Counter(type(site.module).__name__ for site in sites[1:-3])
    # a ReLU for the convolutions of node 0; node 1 has its own, since nothing else reads it
    # node 2 is part of the sum of node 3, and nothing but ReLUs reads node 1
    assert names == {"AvgPool2d": 1, "FusedSum": 2, "ReLU": 1}
    sums = [s for s in sites[1:-3] if type(s.module).__name__ == "FusedSum"]
    assert [s.macs for s in sums] == [64 * 16, 64 * 2 * 144]
    assert [s.module.rectified for s in sums] == [True, False]


def test_every_compiled_network_is_covered() -> None:
    space = NasBench201(widths=(4,), num_cells=3, img_size=8)
    known = {site.key for site in trace_compiled(space, 10, (1, 3, 8, 8))}
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        sites = trace_architecture(space, space.sample(generator), 10, (1, 3, 8, 8), compiled=True)
        assert {site.key for site in sites} <= known


def test_a_compiled_space_whose_networks_are_its_candidates_needs_nothing_more() -> None:
    assert trace_compiled(SPACES[1], 10, (1, 3, 32, 32)) == []
