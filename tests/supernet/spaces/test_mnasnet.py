from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import timm
import torch
from scipy.stats import chisquare
from torch import nn
from torch.nn.functional import avg_pool2d

from latency.model import macs_cost, params_cost
from latency.sites import Site, trace, trace_architecture
from supernet.choice import Architecture
from supernet.derive import Infeasible, derive, reachable
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import MixedOp, PathWeights, one_hot
from supernet.sampling import RangeSampler
from supernet.spaces.mnasnet import MnasNet

SMALL: dict[str, Any] = {
    "img_size": 8, "stem_chs": 4, "stem_stride": 1, "stages": [(4, 1, 1), (8, 2, 2)],
    "expansions": [3], "head_chs": 8,
}  # fmt: skip
SHAPE = (1, 3, 8, 8)
MOBILENET_V2: Mapping[str, str] = {
    "op": "mbconv6", "kernel": "3", "se": "0", "skip": "identity", "width": "100", "layers": "+0"
}  # fmt: skip


def settle(space: MnasNet, **others: str) -> Architecture:
    """MobileNetV2 unless said otherwise."""
    plain = {c.name: MOBILENET_V2[c.name.split("_")[0]] for c in space.decided}
    return space.architecture({**plain, **others})


@cache
def tiny() -> tuple[MnasNet, list[Site], list[Architecture]]:
    """Few enough for all architectures to be tried: what is excluded is left out."""
    space = MnasNet(**SMALL, kernels=(3,))
    first = ["se_1=25", "op_1=conv", "skip_1=pool", "skip_1=identity", "layers_1=+1"]
    space.exclude([*first, "op_2=mbconv3", "skip_2=pool", "layers_2=-1"])
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, SHAPE)
    options = itertools.product(*(space.allowed(choice) for choice in space.decided))
    names = [choice.name for choice in space.decided]
    every = [space.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]
    return space, sites, every


def num_params(space: MnasNet, architecture: Architecture) -> int:
    return sum(p.numel() for p in space.build_network(architecture, 10).parameters())


# ---- what there is to choose


def test_size() -> None:
    """Operations, kernels, ratios, skips, widths, layers; of the first and the last block of
    MobileNetV2, which have one layer, none can be taken away."""
    per_block = 4 * 2 * 2 * 3 * 3
    assert per_block * 3 == 432  # the paper's S
    assert MnasNet().size == (per_block * 3) ** 5 * (per_block * 2) ** 2
    assert MnasNet(**SMALL).size == (3 * 2 * 2 * 3 * 3) ** 2 * 2 * 3


def test_genes_are_the_single_decisions_in_the_order_of_the_paper() -> None:
    space = MnasNet()
    names = ["op", "kernel", "se", "skip", "width", "layers"]
    assert [c.name for c in space.genes] == [f"{n}_{b}" for b in range(1, 8) for n in names]
    assert space.by_name["op_3"].options == ("conv", "sepconv", "mbconv3", "mbconv6")
    assert space.by_name["layers_1"].options == ("+0", "+1")
    assert space.by_name["layers_2"].options == ("-1", "+0", "+1")
    architecture = settle(space, op_3="conv", width_2="75")
    assert space.decode(space.encode(architecture)) == architecture


def test_mobilenet_v2_is_an_architecture() -> None:
    space = MnasNet()
    network = space.build_network(settle(space, op_1="sepconv"), 1000)
    reference = timm.create_model("mobilenetv2_100")
    ours, theirs = (list(n.state_dict().values()) for n in (network, reference))
    assert [value.shape for value in ours] == [value.shape for value in theirs]


def test_mnasnet_a1_computes_what_timm_has(unsettle: Callable[[nn.Module], nn.Module]) -> None:
    """Figure 7 of the paper. The fifth block has 112 filters there, 1.17 times MobileNetV2's."""
    stages = [(16, 1, 1), (24, 2, 2), (40, 3, 2), (80, 4, 2), (112, 2, 1), (160, 3, 2), (320, 1, 1)]
    space = MnasNet(stages=stages)
    architecture = settle(
        space, op_1="sepconv", op_3="mbconv3", kernel_3="5", se_3="25", se_5="25", se_6="25",
        kernel_6="5",
    )  # fmt: skip
    network = space.build_network(architecture, 1000).eval()
    reference = unsettle(timm.create_model("semnasnet_100")).eval()
    names, values = list(network.state_dict()), reference.state_dict().values()
    network.load_state_dict(dict(zip(names, values, strict=True)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images), atol=1e-4, rtol=1e-4)


def test_sampling_is_uniform() -> None:
    space, _, every = tiny()
    assert len(every) == (2 * 3) * (2 * 2 * 2 * 3 * 2)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(space.sample(generator) for _ in range(5 * len(every)))
    assert set(drawn) <= set(every)
    assert chisquare([drawn[architecture] for architecture in every]).pvalue > 0.01


# ---- what they build


def test_layers_of_a_block_are_alike_but_for_the_first() -> None:
    space = MnasNet(**{**SMALL, "stages": [(4, 1, 1), (8, 4, 2)], "expansions": [3, 6]})
    architecture = settle(
        space, kernel_2="5", se_2="25", width_1="125", width_2="75", layers_2="+1", op_2="mbconv3"
    )
    stage: Any = space.build_network(architecture, 10).blocks[1]
    assert len(stage.layers) == 5
    shapes = [
        (layer.conv_pw.in_channels, layer.conv_dw.kernel_size, layer.conv_dw.stride,
         layer.se.conv_reduce.out_channels, layer.conv_pwl.out_channels)
        for layer in stage.layers
    ]  # fmt: skip
    assert shapes == [(5, (5, 5), (2, 2), 1, 6), *[(6, (5, 5), (1, 1), 2, 6)] * 4]


@pytest.mark.parametrize("skip", ["none", "identity", "pool"])
def test_skip_paths(skip: str) -> None:
    space = MnasNet(**SMALL)
    architecture = settle(space, op_1="conv", op_2="sepconv", skip_2=skip, layers_2="+1")
    stage: Any = space.build_network(architecture, 10).eval().blocks[1]
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        first = stage.layers[0](x)
        expected = first
        for layer in stage.layers[1:]:
            added = {
                "none": torch.zeros_like(expected),
                "identity": expected,
                "pool": avg_pool2d(expected, 3, 1, 1, count_include_pad=False),
            }
            expected = layer(expected) + added[skip]
        assert len(stage.layers) == 3 and first.shape == (2, 8, 4, 4)
        torch.testing.assert_close(stage(x), expected)


def test_regular_convolutions() -> None:
    space = MnasNet(**SMALL)
    plain = settle(space, op_1="conv", op_2="conv", layers_2="-1", kernel_2="5")
    squeezed = settle(space, op_1="conv", op_2="conv", layers_2="-1", kernel_2="5", se_2="25")
    layer: Any = space.build_network(plain, 10).blocks[1].layers[0]
    assert layer.conv.weight.shape == (8, 4, 5, 5) and type(layer.bn1.act) is nn.ReLU
    # two 1x1 convolutions with a bias, on the 8 filters and a quarter of the 4 that are read
    assert num_params(space, squeezed) - num_params(space, plain) == (8 + 1) * 1 + (1 + 1) * 8


# ---- costs


def test_an_architecture_costs_what_its_network_costs() -> None:
    space = MnasNet(**SMALL, kernels=(5,))
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, SHAPE)
    params, macs = params_cost(space.choices, sites), macs_cost(space.choices, sites)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        architecture = space.sample(generator)
        pairs = {(None, None), *architecture}
        ours = [site for site in sites if (site.choice, site.option) in pairs]
        own = trace_architecture(space, architecture, 10, SHAPE)
        assert Counter(site.key for site in ours) == Counter(site.key for site in own)
        assert params.of(architecture) == num_params(space, architecture)
        assert macs.of(architecture) == sum(site.macs for site in own)


def test_the_expected_cost_is_the_mean() -> None:
    """Of all architectures, each as probable as its options together."""
    space, sites, every = tiny()
    cost, generator = params_cost(space.choices, sites), torch.Generator().manual_seed(0)
    p = {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        * torch.tensor([option in space.allowed(c) for option in c.options])
        for c in space.decided
    }
    p = {name: vector / vector.sum() for name, vector in p.items()}
    expected = 0.0
    for architecture in every:
        mass = math.prod(float(p[c.name][c.index(architecture[c.name])]) for c in space.decided)
        expected += mass * cost.of(architecture)
    shares = space.shares(p)
    assert list(shares) == [choice.name for choice in space.choices]
    assert all(float(share.sum()) == pytest.approx(1.0) for share in shares.values())
    assert float(cost.expected(shares)) == pytest.approx(expected)


def test_derivation_is_exact() -> None:
    """Against all architectures, with and without a budget."""
    space, sites, every = tiny()
    cost, generator = macs_cost(space.choices, sites), torch.Generator().manual_seed(0)
    costs = {architecture: cost.of(architecture) for architecture in every}
    low, high = min(costs.values()), max(costs.values())
    assert reachable(space, cost) == (low, high)
    scores = {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        for c in space.decided
    }
    totals = {
        a: sum(float(scores[c.name][c.index(a[c.name])]) for c in space.decided) for a in every
    }
    for budget in (high, (low + high) / 2, 1.2 * low):
        found = derive(space, scores, cost, budget)
        best = max(total for a, total in totals.items() if costs[a] <= budget)
        assert costs[found] <= budget and totals[found] == pytest.approx(best)
    with pytest.raises(Infeasible):
        derive(space, scores, cost, 0.99 * low)


def test_sampling_within_a_range_of_costs() -> None:
    """The options that costs depend on most are as frequent as in the range."""
    space, sites, every = tiny()
    cost = macs_cost(space.choices, sites)
    costs = sorted(map(cost.of, every))
    low, high = costs[len(every) // 3], costs[len(every) // 2]
    sampler, generator = RangeSampler(space, cost, low, high), torch.Generator().manual_seed(0)
    inside = {a for a in every if low <= cost.of(a) <= high}
    drawn = [sampler.sample(generator) for _ in range(120)]
    assert set(drawn) <= inside
    for name in ("op_1", "width_1", "op_2", "width_2", "layers_2"):
        share = {o: len(list(g)) for o, g in itertools.groupby(sorted(a[name] for a in inside))}
        counts = Counter(architecture[name] for architecture in drawn)
        expected = [120 * share[option] / len(inside) for option in share]
        assert chisquare([counts[option] for option in share], expected).pvalue > 1e-3


def test_only_combinations_that_were_chosen_are_valid() -> None:
    """The constraints say the same as `implied`: no other option of an implied choice passes."""
    space = MnasNet(**SMALL)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        pairs = dict(space.sample(generator))
        assert all(rule.holds(pairs.items()) for rule in space.constraints)
        for choice in (c for c in space.choices if c.implied):
            for option in set(choice.options) - {pairs[choice.name]}:
                wrong = {**pairs, choice.name: option}
                assert not all(rule.holds(wrong.items()) for rule in space.constraints)


def test_what_is_excluded_goes_with_its_combinations() -> None:
    space = MnasNet(**SMALL)
    space.exclude(["op_2=conv", "width_1=125"])
    first, second = (space.allowed(space.by_name[name]) for name in ("first_1", "first_2"))
    assert len(first) == 3 * 2 * 2 * 2 and len(second) == 2 * 2 * 2 * 2 * 3
    assert all("conv" not in option.split("_") for option in second)
    assert all(option.split("_")[-2] != "125" for option in second)


# ---- shared weights


def test_widths_share_weights() -> None:
    space = MnasNet(**SMALL)
    supernet, found = space.build_supernet(10), []
    for width in ("75", "125"):
        architecture = settle(space, op_1="sepconv", op_2="mbconv3", width_1=width, width_2=width)
        network = space.build_network(architecture, 10)
        inherit_weights(supernet, network, dict(architecture))
        found.append([p for p in network.parameters()])
    assert sum(narrow.shape != wide.shape for narrow, wide in zip(*found, strict=True)) > 10
    for narrow, wide in zip(*found, strict=True):
        assert torch.equal(narrow, wide[tuple(map(slice, narrow.shape))])


@pytest.mark.parametrize("skip", ["none", "identity", "pool"])
def test_a_path_of_the_supernet_is_the_derived_network(skip: str) -> None:
    """The first block keeps side and width, yet its first layer has no skip."""
    space = MnasNet(**SMALL)
    architecture = settle(
        space, op_1="conv", skip_1=skip, layers_1="+1", op_2="mbconv3", skip_2=skip, width_2="75"
    )
    supernet, network = space.build_supernet(10).eval(), space.build_network(architecture, 10)
    inherit_weights(supernet, network.eval(), dict(architecture))
    images = torch.randn(SHAPE)
    with torch.no_grad():
        found = supernet(images, one_hot(architecture, space.choices))
        torch.testing.assert_close(found, network(images))


def test_what_is_not_run_has_no_gradient() -> None:
    space = MnasNet(**SMALL)
    supernet: Any = space.build_supernet(10)
    architecture = settle(space, op_1="sepconv", op_2="conv", layers_2="-1", width_2="75")
    supernet(torch.randn(2, *SHAPE[1:]), one_hot(architecture, space.choices)).sum().backward()
    moved = {name for name, p in supernet.blocks[1].named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("layers.0.conv_3_0.") for name in moved)
    gradient = supernet.blocks[1].layers[0]["conv_3_0"].widest.conv.weight.grad
    assert gradient.shape == (10, 5, 3, 3)
    assert gradient[:6, :4].abs().sum() > 0
    assert gradient[6:].abs().sum() == 0 and gradient[:, 4:].abs().sum() == 0


def test_the_supernet_refuses_mixtures() -> None:
    space = MnasNet(**SMALL)
    supernet = space.build_supernet(10)
    weights = one_hot(space.sample(torch.Generator().manual_seed(0)), space.choices)
    weights["width_1"] = PathWeights((0, 1), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="runs one option a choice; 'width_1' mixes 2"):
        supernet(torch.randn(SHAPE), weights)


# ---- the rest


def test_the_diagram_shows_the_blocks() -> None:
    space = MnasNet(**SMALL)
    architecture = settle(
        space, op_1="sepconv", op_2="conv", se_2="25", width_2="75", layers_2="+1", skip_2="pool"
    )
    diagram = space.diagram(architecture)
    assert diagram.nodes == (
        "image", "stem 4", "1 x sepconv k3 4", "3 x conv k3 6 se25 pool /2", "head 8"
    )  # fmt: skip
    assert diagram.edges == tuple((i, i + 1, "") for i in range(4))


def test_a_derived_network_is_a_timm_model() -> None:
    architecture = MnasNet(**SMALL).sample(torch.Generator().manual_seed(0))
    content = json.loads(json.dumps(architecture.to_dict()))
    network = timm.create_model("supernet_derived", architecture=content, num_classes=7)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    network.reset_classifier(4)
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "one block or more"),
        ({"stages": [(16, 1)]}, r"\[width, layers, stride\]; got \[16, 1\]"),
        ({"stages": [(18, 1, 1)]}, "multiples of 4, .* got 18"),
        ({"stages": [(16, 0, 1)]}, "one layer or more; got 0"),
        ({"kernels": [3, 4]}, "must be odd, as 3 and 5 are; got 4"),
        ({"expansions": [0]}, "must be 1 or more; got 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MnasNet(**settings)
