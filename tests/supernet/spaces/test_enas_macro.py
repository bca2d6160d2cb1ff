from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from latency.model import params_cost
from latency.sites import trace, trace_architecture, trace_compiled
from supernet.choice import Architecture
from supernet.mixed_ops.base import MixedOp, PathWeights, compact
from supernet.spaces.enas_macro import ENASMacro

OPERATIONS = (
    "conv_3x3", "sep_conv_3x3", "conv_5x5", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3",
)  # fmt: skip


def small(num_layers: int = 4, widening: int = 1, img_size: int = 8) -> ENASMacro:
    return ENASMacro(width=4, num_layers=num_layers, widening=widening, img_size=img_size)


def settle(space: ENASMacro, joined: set[tuple[int, int]], operation: str) -> Architecture:
    options = {}
    for choice in space.choices:
        kind, *numbers = choice.name.split("_")
        if kind == "skip":
            options[choice.name] = "join" if tuple(map(int, numbers)) in joined else "cut"
        else:
            options[choice.name] = operation
    return space.architecture(options)


def test_size_is_that_of_the_paper() -> None:
    assert ENASMacro().size == 6**12 * 2 ** (12 * 11 // 2)
    assert small(5).size == 6**5 * 2**10


def test_choices_are_in_the_order_of_the_controller() -> None:
    """Each layer its operation, then one bit for each earlier state but the last."""
    names = [choice.name for choice in small(4).genes]
    assert names == [
        "layer_1", "layer_2", "skip_0_2", "layer_3", "skip_0_3", "skip_1_3",
        "layer_4", "skip_0_4", "skip_1_4", "skip_2_4",
    ]  # fmt: skip
    assert small().by_name["layer_1"].options == OPERATIONS
    assert len(ENASMacro().choices) == 12 + 66


def test_the_controllers_state_at_the_layer_that_reads_a_state_stands_for_it() -> None:
    """As in the official code, where skip i of a layer is of the i-th layer's input."""
    assert small(4).anchors == {
        "skip_0_2": "layer_1", "skip_0_3": "layer_1", "skip_1_3": "layer_2",
        "skip_0_4": "layer_1", "skip_1_4": "layer_2", "skip_2_4": "layer_3",
    }  # fmt: skip


def test_sampling_is_uniform() -> None:
    space, generator = small(3), torch.Generator().manual_seed(0)
    drawn = Counter(space.sample(generator) for _ in range(10 * space.size))
    assert space.size == 6**3 * 2**3
    counts = [drawn[a] for a in drawn] + [0] * (space.size - len(drawn))
    assert stats.chisquare(counts).pvalue > 0.01


def parameters(operation: str, chs: int) -> int:
    """With the 1x1 convolution and the norms, by hand."""
    entry = chs * chs + 2 * chs
    side = {"3x3": 9, "5x5": 25}[operation[-3:]]
    if "pool" in operation:
        return entry
    if operation.startswith("sep"):
        return entry + side * chs + chs * chs + 2 * chs
    return entry + side * chs * chs + 2 * chs


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("widening", [1, 2])
def test_parameters_counted_by_hand(operation: str, widening: int) -> None:
    space = small(6, widening)
    widths = [4, 4, 4 * widening, 4 * widening, 4 * widening**2, 4 * widening**2]
    expected = 27 * 4 + 8  # the stem
    expected += sum(parameters(operation, chs) for chs in widths)
    expected += sum(2 * chs for chs in widths[1:])  # norms after sums
    for states, before, after in ((3, widths[0], widths[2]), (5, widths[2], widths[4])):
        expected += states * (before * after + 2 * after)
    expected += 10 * (widths[-1] + 1)
    network = space.build_network(settle(space, {(0, 3), (1, 6)}, operation), 10)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_a_layer_adds_what_is_joined_and_normalises() -> None:
    """Three layers of averages; reductions follow the first and the second."""
    space = small(3)
    network = space.build_network(settle(space, {(0, 2), (1, 3)}, "avg_pool_3x3"), 10)
    first, down_0, down_1, second, *downs, third = network.blocks
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        state_0 = network.stem(images)
        state_1 = first.operation(state_0)
        state_0, state_1 = down_0.reduce(state_0), down_1.reduce(state_1)
        state_2 = second.norm(second.operation(state_1) + state_0)
        state_1, state_2 = downs[1].reduce(state_1), downs[2].reduce(state_2)
        state_3 = third.norm(third.operation(state_2) + state_1)
        assert torch.allclose(network.forward_features(images), state_3, atol=1e-5)
    assert state_3.shape == (2, 4, 2, 2)


def test_a_reduction_reads_all_four_parities() -> None:
    """Half of its channels read the even pixels, half the odd ones."""
    space = small(3)
    reduce = space.build_network(settle(space, set(), "conv_3x3"), 10).blocks[1].reduce.eval()
    x = torch.zeros(1, 4, 4, 4)
    x[:, :, 2, 2] = 1.0
    even = reduce(x) - reduce(torch.zeros_like(x))
    assert even[:, :2, 1, 1].abs().min() > 0 and even[:, 2:].abs().max() == 0
    x = torch.zeros(1, 4, 4, 4)
    x[:, :, 1, 1] = 1.0
    odd = reduce(x) - reduce(torch.zeros_like(x))
    assert odd[:, 2:, 0, 0].abs().min() > 0 and odd[:, :2].abs().max() == 0


def test_pools_average_without_their_padding() -> None:
    space = small(3)
    pool = space.build_network(settle(space, set(), "avg_pool_3x3"), 10).blocks[0].operation[-1]
    x = torch.randn(1, 4, 8, 8)
    expected = avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    assert torch.allclose(pool(x), expected)


def test_a_mixture_weighs_skips() -> None:
    space = small(3)
    supernet = space.build_supernet(10).eval()
    images = torch.randn(2, 3, 8, 8)
    weights = {
        choice.name: PathWeights((0,)) if choice.name.startswith("layer")
        else PathWeights((0, 1), torch.tensor([0.75, 0.25]))
        for choice in space.choices
    }  # fmt: skip
    seen: dict[str, Tensor] = {}
    third = supernet.blocks[-1]
    third.norm.register_forward_pre_hook(lambda _, args: seen.update(total=args[0]))
    third.operation.register_forward_hook(lambda *args: seen.update(operation=args[2]))
    third.skips[1].candidates["join"].register_forward_hook(
        lambda *args: seen.update(state_1=args[2])
    )
    third.skips[0].candidates["join"].register_forward_hook(
        lambda *args: seen.update(state_0=args[2])
    )
    supernet(images, weights)
    expected = seen["operation"] + 0.25 * (seen["state_0"] + seen["state_1"])
    assert torch.allclose(seen["total"], expected, atol=1e-6)


def test_each_join_costs_an_addition() -> None:
    space = small()
    shape = (1, 3, 8, 8)
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, shape)
    adds = Counter((s.choice, s.option) for s in sites if type(s.module).__name__ == "Add")
    joins = {(c.name, "join"): 1 for c in space.choices if c.name.startswith("skip")}
    assert adds == joins
    keys = {site.key for site in sites}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        architecture = space.sample(generator)
        own = trace_architecture(space, architecture, 10, shape)
        names = Counter(type(site.module).__name__ for site in own)
        assert names["Add"] == [option for _, option in architecture].count("join")
        assert {site.key for site in own} <= keys  # nothing that a table would lack


def test_costs_are_additive() -> None:
    space = small(6, widening=2)
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 3, 8, 8))
    cost, generator = params_cost(space.choices, sites), torch.Generator().manual_seed(0)
    for _ in range(5):
        architecture = space.sample(generator)
        network = space.build_network(architecture, 10)
        assert cost.of(architecture) == sum(p.numel() for p in network.parameters())


def test_compiled_networks_leave_out_what_nothing_reads(
    unsettle: Callable[[nn.Module], nn.Module],
) -> None:
    space, x = small(6), torch.randn(2, 3, 8, 8)
    # states 0 to 2 are brought down after layer 2, of which 0 is read; then 0 to 4, of which 1 is
    for joined, reductions in (
        ({(0, 3)}, {0, 2, 7}),
        ({(1, 5), (2, 4)}, {1, 2, 4, 7}),
        (set(itertools.combinations(range(6), 2)), set(range(8))),
    ):
        joined = {(s, t) for s, t in joined if t - s > 1}
        architecture = settle(space, joined, "sep_conv_3x3")
        network = unsettle(space.build_network(architecture, 10)).eval()
        before = network(x)
        compact(network)
        assert torch.equal(network(x), before)
        downs = [block for block in network.blocks if type(block).__name__ == "Reduction"]
        assert len(downs) == 3 + 5
        assert {i for i, down in enumerate(downs) if not down.idle} == reductions
        sites = trace_architecture(space, architecture, 10, (1, 3, 8, 8), compiled=True)
        names = Counter(type(site.module).__name__ for site in sites)
        assert names["FactorizedReduction"] == len(reductions)
    assert trace_compiled(space, 10, (1, 3, 8, 8)) == []


def test_the_diagram_shows_operations_and_joined_states() -> None:
    space = small(3)
    diagram = space.diagram(settle(space, {(0, 3)}, "max_pool_3x3"))
    assert diagram.nodes == ("stem", "1 /2", "2 /2", "3", "output")
    pool = "max_pool_3x3"
    assert set(diagram.edges) == {
        (0, 1, pool), (1, 2, pool), (0, 3, ""), (2, 3, pool), (3, 4, ""),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 2}, "num_layers must be 3 or more; got 2"),
        ({"width": 1}, "width must be 2 or more; got 1"),
        ({"widening": 0}, "widening must be 1 or more; got 0"),
    ],
)
def test_settings_that_make_no_network_are_refused(
    settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ENASMacro(**settings)
