from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from latency.sites import trace_architecture
from latency.traced import TracedCost
from supernet.choice import Architecture
from supernet.derive import reachable
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import PathWeights, one_hot
from supernet.spaces.nas_rl import NasRL


def settle(space: NasRL, joined: set[tuple[int, int]], **others: str) -> Architecture:
    """3x3 filters, 24 of them, of stride 1, unless said otherwise."""
    plain = {"height": "3", "width": "3", "filters": "24", "stride": "1"}
    options = {}
    for choice in space.choices:
        kind, *rest = choice.name.split("_")
        if kind == "skip":
            options[choice.name] = "join" if tuple(map(int, rest)) in joined else "cut"
        else:
            options[choice.name] = others.get(choice.name, plain[kind])
    return space.architecture(options)


def test_size_is_that_of_the_paper() -> None:
    assert NasRL().size == (4 * 4 * 4) ** 15 * 2 ** (15 * 14 // 2)
    assert NasRL(strides=True).size == (4 * 4 * 4 * 3 * 3) ** 15 * 2 ** (15 * 14 // 2)
    assert NasRL(num_layers=3).size == 64**3 * 2**3


def test_choices_are_in_the_order_of_the_controller() -> None:
    space = NasRL(num_layers=3, strides=True)
    names = [choice.name for choice in space.genes]
    shape = ["height", "width", "stride_height", "stride_width", "filters"]
    assert names == [
        *(f"{part}_1" for part in shape), *(f"{part}_2" for part in shape), "skip_1_2",
        *(f"{part}_3" for part in shape), "skip_1_3", "skip_2_3",
    ]  # fmt: skip
    assert space.by_name["height_1"].options == ("1", "3", "5", "7")
    assert space.by_name["filters_1"].options == ("24", "36", "48", "64")
    assert space.by_name["stride_width_2"].options == ("1", "2", "3")


def test_the_controllers_state_where_a_layer_begins_stands_for_it() -> None:
    assert NasRL(num_layers=3).anchors == {
        "skip_1_2": "height_1", "skip_1_3": "height_1", "skip_2_3": "height_2"
    }  # fmt: skip


def test_sampling_is_uniform() -> None:
    """Each option of each choice, and pairs of skips."""
    space, generator = NasRL(num_layers=3), torch.Generator().manual_seed(0)
    drawn = [dict(space.sample(generator)) for _ in range(2000)]
    for choice in space.choices:
        counts = Counter(options[choice.name] for options in drawn)
        expected = 2000 / len(choice.options)
        # beyond five standard deviations
        assert all(abs(counts[o] - expected) < 5 * expected**0.5 for o in choice.options)
    pairs = Counter((options["skip_1_2"], options["skip_1_3"]) for options in drawn)
    assert len(pairs) == 4 and min(pairs.values()) > 400


def test_the_rules_of_the_paper() -> None:
    """Without inputs the image; inputs side by side, filled with zeros; what is not read goes to
    the classifier."""
    space = NasRL(num_layers=5, strides=True, img_size=8)
    joined = {(1, 3), (2, 3), (1, 4)}  # 2 and 5 read the image; 3, 4 and 5 are not read
    architecture = settle(
        space, joined, filters_2="36", filters_4="48", stride_height_2="2", stride_width_2="3",
        stride_height_5="3", height_4="1", width_4="7",
    )  # fmt: skip
    network = space.build_network(architecture, 10).eval()
    layers: Any = network.blocks[0].layers
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        one, two, five = layers[0](x), layers[1](x), layers[4](x)
        assert one.shape[1:] == (24, 8, 8)
        assert two.shape[1:] == (36, 4, 3)
        assert five.shape[1:] == (24, 3, 8)
        three = layers[2](torch.cat([one, pad(two, (0, 5, 0, 4))], dim=1))
        four = layers[3](one)
        expected = torch.cat([three, four, pad(five, (0, 0, 0, 5))], dim=1)
        assert torch.allclose(network.forward_features(x), expected, atol=1e-6)
    assert network.num_features == 24 + 48 + 24
    assert [type(module).__name__ for module in layers[3]] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert layers[3][0].kernel_size == (1, 7)


def parameters(space: NasRL, architecture: Architecture, num_classes: int) -> int:
    """By the formula, without a network."""
    options, read, total = dict(architecture), set(), 0
    for layer in range(1, space.num_layers + 1):
        sources = [s for s in range(1, layer) if options[f"skip_{s}_{layer}"] == "join"]
        read |= set(sources)
        in_chs = sum(int(options[f"filters_{s}"]) for s in sources) or 3
        area = int(options[f"height_{layer}"]) * int(options[f"width_{layer}"])
        total += (area * in_chs + 2) * int(options[f"filters_{layer}"])
    ends = [layer for layer in range(1, space.num_layers + 1) if layer not in read]
    features = sum(int(options[f"filters_{layer}"]) for layer in ends)
    return total + num_classes * (features + 1)


@pytest.mark.parametrize("strides", [False, True])
def test_cost_is_that_of_the_network(strides: bool) -> None:
    space, generator = NasRL(strides=strides, img_size=8), torch.Generator().manual_seed(0)
    cost = TracedCost("params", 10, (1, 3, 8, 8))
    for _ in range(4):
        architecture = space.sample(generator)
        assert cost.of(architecture) == parameters(space, architecture, 10)


def test_the_cost_is_no_sum_over_choices() -> None:
    """Two filters more each cost more together."""
    space = NasRL(num_layers=2)
    cost = TracedCost("params", 10, (1, 3, 8, 8))
    few = cost.of(settle(space, {(1, 2)}))
    one = cost.of(settle(space, {(1, 2)}, filters_1="64"))
    two = cost.of(settle(space, {(1, 2)}, filters_2="64"))
    both = cost.of(settle(space, {(1, 2)}, filters_1="64", filters_2="64"))
    assert both - few == (one - few) + (two - few) + 9 * 40 * 40


@pytest.mark.parametrize("num_classes", [2, 100])
def test_the_ends_frame_all_architectures(num_classes: int) -> None:
    """With few classes a chain is not the cheapest, with many it is."""
    space = NasRL(num_layers=3)
    space.exclude(["*=3", "*=5", "width_*=7", "*=36", "*=48"])
    costs = []
    for options in itertools.product(*(space.allowed(choice) for choice in space.choices)):
        names = [choice.name for choice in space.choices]
        architecture = space.architecture(dict(zip(names, options, strict=True)))
        costs.append(parameters(space, architecture, num_classes))
    assert len(costs) == 2**9
    cost = TracedCost("params", num_classes, (1, 3, 8, 8))
    assert reachable(space, cost) == (min(costs), max(costs))


def test_the_supernet_refuses_mixtures() -> None:
    space = NasRL(num_layers=2)
    supernet = space.build_supernet(10)
    weights = one_hot(space.sample(torch.Generator().manual_seed(0)), space.choices)
    weights["filters_1"] = PathWeights((0, 1), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="runs one option a choice; 'filters_1' mixes 2"):
        supernet(torch.randn(1, 3, 8, 8), weights)


def test_shapes_share_weights() -> None:
    """A small kernel is the centre of a large one, few filters are the first of many."""
    space = NasRL(num_layers=2, img_size=8)
    supernet = space.build_supernet(10)
    large = settle(space, {(1, 2)}, height_2="7", filters_1="64", filters_2="64")
    small = settle(space, {(1, 2)}, height_2="5", filters_1="36", filters_2="48")
    found = []
    for architecture in (large, small):
        network = space.build_network(architecture, 10)
        inherit_weights(supernet, network, dict(architecture))
        found.append(network.blocks[0].layers[1][0].weight)
    assert found[0].shape == (64, 64, 7, 3) and found[1].shape == (48, 36, 5, 3)
    assert torch.equal(found[1], found[0][:48, :36, 1:6])


def test_what_is_not_run_has_no_gradient() -> None:
    space = NasRL(num_layers=3, img_size=8)
    supernet = space.build_supernet(10)
    architecture = settle(space, {(1, 3)})
    supernet(torch.randn(2, 3, 8, 8), one_hot(architecture, space.choices)).sum().backward()
    layers: Any = supernet.blocks[0].layers

    def moves(conv: nn.Conv2d) -> bool:
        return conv.weight.grad is not None and bool(conv.weight.grad.abs().max() > 0)

    assert moves(layers[0].image) and moves(layers[1].image) and not moves(layers[2].image)
    assert moves(layers[2].others[0]) and not moves(layers[2].others[1])
    grad: Tensor = layers[2].others[0].weight.grad
    centre = grad[:24, :24, 2:5, 2:5].abs().sum()
    assert centre > 0 and torch.allclose(centre, grad.abs().sum())


def test_every_operation_is_a_site() -> None:
    space = NasRL(num_layers=4, img_size=8)
    sites = trace_architecture(space, settle(space, {(1, 3), (2, 3)}), 10, (1, 3, 8, 8))
    names = [type(site.module).__name__ for site in sites]
    assert names.count("Convolution") == 4
    assert names.count("Concat") == 2  # layer 3 and the classifier's input, of layers 3 and 4
    assert sum(site.params for site in sites) == parameters(
        space, settle(space, {(1, 3), (2, 3)}), 10
    )


def test_the_diagram_shows_shapes_and_inputs() -> None:
    space = NasRL(num_layers=3, strides=True)
    diagram = space.diagram(settle(space, {(1, 2)}, height_2="5", stride_width_2="3"))
    assert diagram.nodes == ("image", "3x3 24", "5x3 24 /1x3", "3x3 24", "classifier")
    assert set(diagram.edges) == {(0, 1, ""), (1, 2, ""), (0, 3, ""), (2, 4, ""), (3, 4, "")}


def test_a_derived_network_is_a_timm_model() -> None:
    architecture = NasRL(num_layers=3, img_size=16).sample(torch.Generator().manual_seed(0))
    content = json.loads(json.dumps(architecture.to_dict()))
    network = timm.create_model("supernet_derived", architecture=content, num_classes=7)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    network.reset_classifier(4)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    assert timm.data.resolve_model_data_config(network)["input_size"] == (3, 16, 16)


def test_a_space_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers must be 1 or more; got 0"):
        NasRL(num_layers=0)
