from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from supernet.choice import Architecture
from supernet.mixed_ops.base import compact
from supernet.spaces.compact_cell import plan
from supernet.spaces.nasbench201 import NasBench201

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
STRINGS = [
    f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"
    for a, b, c, d, e, f in itertools.product(OPERATIONS, repeat=6)
]


def everywhere(space: NasBench201, operation: str) -> Architecture:
    return space.architecture({choice.name: operation for choice in space.choices})


def reaches_output(text: str) -> bool:
    """Walk the cell from its input along edges that are not `none`."""
    reached = {0}
    for target, node in enumerate(text.split("+"), start=1):
        edges = [edge.split("~") for edge in node.strip("|").split("|")]
        if any(op != "none" and int(source) in reached for op, source in edges):
            reached.add(target)
    return 3 in reached


def test_all_strings_round_trip() -> None:
    space = NasBench201()
    architectures = [space.from_string(text) for text in STRINGS]
    assert [space.to_string(architecture) for architecture in architectures] == STRINGS
    assert len(set(architectures)) == space.size == 15_625


def test_a_string_names_the_edges_by_their_source() -> None:
    text = "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"
    assert dict(NasBench201().from_string(text)) == {
        "edge_0_1": "none",
        "edge_0_2": "skip_connect",
        "edge_1_2": "nor_conv_1x1",
        "edge_0_3": "nor_conv_3x3",
        "edge_1_3": "avg_pool_3x3",
        "edge_2_3": "none",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not of the form"),
        ("none~0", "not of the form"),
        ("|none~0|+|none~0|none~1|", "no option given for choice 'edge_0_3'"),
        ("|none~0|+|none~1|none~0|+|none~0|none~1|none~2|", "not of the form"),
        ("|none~0|+|none~0|+|none~0|none~1|none~2|", "not of the form"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|conv~2|", "no option 'conv'"),
        (STRINGS[0] + "+|none~0|none~1|none~2|none~3|", "no choice 'edge_0_4'"),
    ],
)
def test_other_strings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NasBench201().from_string(text)


def test_a_cell_is_valid_where_its_output_is_reachable() -> None:
    space = NasBench201()
    valid = [space.is_valid(space.from_string(text)) for text in STRINGS]
    assert valid == [reaches_output(text) for text in STRINGS]
    assert valid.count(False) == 341


def test_invalid_cells_are_those_that_learn_nothing(data_folder: Path) -> None:
    space = NasBench201()
    with open(data_folder / "nasbench201-cifar10.csv", newline="") as file:
        rows = [(row["architecture"], float(row["cifar10_test"])) for row in csv.DictReader(file)]
    assert sorted(text for text, _ in rows) == sorted(STRINGS)
    assert {text for text, accuracy in rows if accuracy <= 10.0} == {
        text for text, _ in rows if not space.is_valid(space.from_string(text))
    }


def test_only_valid_cells_are_sampled() -> None:
    space, generator = NasBench201(), torch.Generator().manual_seed(0)
    drawn = {space.to_string(space.sample(generator)) for _ in range(2000)}
    assert all(reaches_output(text) for text in drawn)
    assert len(drawn) > 1800


# The least and the most that the benchmark reports, in millions. Its FLOPs are multiply-adds of
# convolutions and of the classifier, and the classifier's bias.
@pytest.mark.parametrize(
    ("operation", "num_classes", "params", "flops"),
    [
        ("skip_connect", 10, 0.073306, 7.78305),
        ("nor_conv_3x3", 10, 1.531546, 220.11969),
        ("skip_connect", 100, 0.079156, 7.7889),
        ("nor_conv_3x3", 100, 1.537396, 220.12554),
    ],
)
def test_cost_is_what_the_benchmark_reports(
    operation: str, num_classes: int, params: float, flops: float
) -> None:
    space = NasBench201()
    network = space.build_network(everywhere(space, operation), num_classes).eval()
    count = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        if isinstance(module, nn.Conv2d):
            count += module.weight.numel() * output[0, 0].numel()
        if isinstance(module, nn.Linear):
            count += module.weight.numel() + module.bias.numel()

    for module in network.modules():
        module.register_forward_hook(add)
    network(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == round(params * 1e6)
    assert count == round(flops * 1e6)


def test_a_cell_computes_its_graph() -> None:
    """Operations without weights, so that the expected value can be written down."""
    space = NasBench201(widths=(4,), num_cells=1)
    text = "|skip_connect~0|+|avg_pool_3x3~0|skip_connect~1|+|none~0|avg_pool_3x3~1|skip_connect~2|"
    cell = space.build_network(space.from_string(text), 10).blocks[0]
    x = torch.randn(2, 4, 6, 6)
    ones = torch.ones(1, 1, 6, 6)
    box = torch.ones(1, 1, 3, 3)
    count = nn.functional.conv2d(ones, box, padding=1)  # padding is not part of the average
    pooled = nn.functional.conv2d(x.flatten(0, 1)[:, None], box, padding=1) / count
    pooled = pooled.view_as(x)
    node_2 = pooled + x
    assert torch.allclose(cell(x), pooled + node_2, atol=1e-5)


IDLE = {  # cells, and the edges whose convolutions matter, found by hand
    # node 1 is empty, but what the convolution makes of it counts; node 2 leads nowhere
    "|none~0|+|skip_connect~0|nor_conv_3x3~1|+|nor_conv_1x1~0|nor_conv_1x1~1|none~2|": "03 13",
    # node 2 leads nowhere
    "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|none~0|avg_pool_3x3~1|none~2|": "01",
    # everything is the same node
    "|skip_connect~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_1x1~2|": (
        "03 13 23"
    ),
    # node 2 is a constant, and a kernel of 3 sees where it ends
    "|none~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|": "12 23",
    # no path at all: constants
    "|none~0|+|none~0|nor_conv_3x3~1|+|none~0|nor_conv_3x3~1|nor_conv_3x3~2|": "12 13 23",
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|none~2|": "",
}


def test_a_compact_cell_computes_the_same(
    unsettle: Callable[[nn.Module], nn.Module],
) -> None:
    space = NasBench201(widths=(4,), num_cells=1)
    x = torch.randn(2, 4, 6, 6)
    cells = [space.from_string(text) for text in IDLE]
    cells += [space.from_string(STRINGS[i]) for i in range(0, len(STRINGS), 311)]
    for architecture in cells:
        cell = unsettle(space.build_network(architecture, 10)).eval().blocks[0]
        before = cell(x)
        cell.compact()
        assert (cell(x) - before).abs().max() < 1e-5, space.to_string(architecture)


@pytest.mark.parametrize(("text", "edges"), IDLE.items())
def test_a_compact_cell_leaves_out_what_does_not_reach_the_output(text: str, edges: str) -> None:
    space = NasBench201(widths=(4,), num_cells=1)
    found = plan(space.build_network(space.from_string(text), 10).blocks[0].layers())
    used = [*(edge for step in found.steps for edge in (*step.convs, *step.constant))]
    used += [edge for edges in found.constant.values() for edge in edges]
    assert {f"{source}{target}" for source, target in used} == set(edges.split())


def test_compact_cells_in_a_row_compute_the_same(
    unsettle: Callable[[nn.Module], nn.Module],
) -> None:
    """A ReLU that alone reads a cell's output moves into the cell before it."""
    space = NasBench201(widths=(4, 8), num_cells=3, img_size=6)
    x = torch.randn(2, 3, 6, 6)
    moved = 0
    for text in [*IDLE, *STRINGS[::977]]:
        network = unsettle(space.build_network(space.from_string(text), 10)).eval()
        before = network(x)
        compact(network)
        assert (network(x) - before).abs().max() < 1e-4, text
        moved += network.blocks[1].compacted.plan.rectified_input
    assert moved > 2
