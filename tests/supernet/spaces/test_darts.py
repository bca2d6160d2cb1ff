from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.derive import derive, reachable
from supernet.mixed_ops.softmax import Softmax
from supernet.network import WithAuxiliary
from supernet.ops.darts import AuxiliaryHead, SeparableConv
from supernet.sampling import RangeSampler
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts

OPERATIONS = (
    "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
    "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5",
)  # fmt: skip
SPACE = Darts(width=4, num_cells=3, img_size=8)
# As published (Liu et al. 2019, second order); operations of a node in the order of their strength.
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
SORTED = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('max_pool_3x3', 1), ('skip_connect', 2)], reduce_concat=range(2, 6))"
)


def random_logits(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        choice.name: scale * torch.randn(len(OPERATIONS), generator=generator)
        for choice in SPACE.choices
    }


def rule(logits: Mapping[str, Tensor], kind: str) -> list[tuple[str, int]]:
    """The paper's derivation (section 2.4), from softmax weights as rows of one array."""
    edges = [(s, t) for t in range(2, 6) for s in range(t)]
    weights = np.stack([logits[f"{kind}_{s}_{t}"].double().softmax(0).numpy() for s, t in edges])
    genes = []
    for node in range(2, 6):
        rows = {s: weights[edges.index((s, node))][1:] for s in range(node)}
        for source in sorted(sorted(rows, key=lambda s: -rows[s].max())[:2]):
            genes.append((OPERATIONS[1 + int(rows[source].argmax())], source))
    return genes


@pytest.mark.parametrize("seed", range(8))
def test_derivation_without_a_budget_is_the_papers_rule(seed: int) -> None:
    logits = random_logits(seed, scale=(0.001, 1.0, 5.0)[seed % 3])
    if seed % 2:  # `none` is strongest nearly everywhere, and more so on some edges than on others
        generator = torch.Generator().manual_seed(seed)
        for vector in logits.values():
            vector[0] += 8 * torch.rand((), generator=generator)
    found = derive(SPACE, Softmax().scores(logits))
    expected = ", ".join(
        f"{kind}={rule(logits, kind)!r}, {kind}_concat=range(2, 6)" for kind in ("normal", "reduce")
    )
    assert SPACE.to_string(found) == f"Genotype({expected})"


def test_none_takes_part_in_the_strength_of_an_edge_only_through_the_softmax() -> None:
    """Equal logits but for `none`: the edges with the least of it are the strongest."""
    logits = {c.name: torch.arange(8.0) / 8 for c in SPACE.choices}
    for source, none in enumerate((3.0, 1.0, 4.0, 2.0, 0.5)):
        logits[f"normal_{source}_5"][0] = none
    found = derive(SPACE, Softmax().scores(logits))
    assert [s for s in range(5) if found[f"normal_{s}_5"] != "none"] == [1, 4]


def random_cost(seed: int) -> AdditiveCost:
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        for c in SPACE.choices
    }
    for vector in vectors.values():
        vector[0] = 0.0
    return AdditiveCost(SPACE.choices, 0.5, vectors, "latency", "ms")


def node_ways(node: int) -> list[dict[int, int]]:
    """{source: option} of what a node keeps, all of them."""
    return [
        dict(zip(pair, options, strict=True))
        for pair in itertools.combinations(range(node), 2)
        for options in itertools.product(range(1, 8), repeat=2)
    ]


def test_derivation_under_a_budget_is_the_best_of_all() -> None:
    """Everything but the last node of each cell is fixed: 490^2 architectures are compared."""
    space = Darts(width=4, num_cells=3, img_size=8)
    fixed = dict(space.sample(torch.Generator().manual_seed(3)))
    free = {f"{kind}_{s}_5" for kind in ("normal", "reduce") for s in range(5)}
    space.exclude(
        [f"{n}={o}" for n, kept in fixed.items() if n not in free for o in OPERATIONS if o != kept]
    )
    logits, cost = random_logits(11), random_cost(5)
    p = {name: vector.double().log_softmax(0) for name, vector in logits.items()}
    base = [(n, OPERATIONS.index(o)) for n, o in fixed.items() if n not in free and o != "none"]
    totals = []
    for table in (p, cost.per_option):
        each = [
            np.array([
                sum(float(table[f"{kind}_{s}_5"][o]) for s, o in way.items())
                for way in node_ways(5)
            ])
            for kind in ("normal", "reduce")
        ]  # fmt: skip
        rest = sum(float(table[name][option]) for name, option in base)
        totals.append(rest + each[0][:, None] + each[1][None, :])
    scores, costs = totals[0], 0.5 + totals[1]
    low, high = reachable(space, cost)
    assert (low, high) == pytest.approx((costs.min(), costs.max()))
    for share in (0.05, 0.2, 0.5):
        budget = low + share * (high - low)
        found = derive(space, Softmax().scores(logits), cost, budget)
        assert space.is_valid(found) and cost.of(found) <= budget
        pairs = [(n, OPERATIONS.index(o)) for n, o in found if o != "none"]
        best = scores[costs <= budget].max()
        assert sum(float(p[n][o]) for n, o in pairs) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_those_of_all_architectures(seed: int) -> None:
    """Node by node: every way, in proportion to the product of what it keeps."""
    logits = random_logits(seed, 2.0)
    p = {name: vector.double().softmax(0) for name, vector in logits.items()}
    found = SPACE.shares(p)
    for kind, node in itertools.product(("normal", "reduce"), range(2, 6)):
        ways = node_ways(node)
        masses = [math.prod(p[f"{kind}_{s}_{node}"][o].item() for s, o in w.items()) for w in ways]
        expected = torch.zeros(node, 8, dtype=torch.float64)
        for way, mass in zip(ways, masses, strict=True):
            for source in range(node):
                expected[source, way.get(source, 0)] += mass / sum(masses)
        for source in range(node):
            torch.testing.assert_close(found[f"{kind}_{source}_{node}"], expected[source])


def test_shares_of_one_architecture_are_that_architecture() -> None:
    architecture = SPACE.sample(torch.Generator().manual_seed(0))
    hot = {
        c.name: torch.eye(8)[c.index(architecture[c.name])].requires_grad_() for c in SPACE.choices
    }
    shares = SPACE.shares(hot)
    assert all(torch.equal(shares[name], hot[name]) for name in hot)
    assert random_cost(0).expected(shares).item() == pytest.approx(random_cost(0).of(architecture))
    sum(share.square().sum() for share in shares.values()).backward()
    assert all(vector.grad.isfinite().all() for vector in hot.values())


# ---- what is valid


def test_a_node_reads_two_others() -> None:
    space = Darts()
    architecture = space.from_string(DARTS_V2)
    assert space.is_valid(architecture)
    for changed in ({"normal_1_2": "none"}, {"normal_0_5": "none"}, {"reduce_4_5": "sep_conv_3x3"}):
        assert not space.is_valid(space.architecture({**dict(architecture), **changed}))


def test_sampling_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.sample(generator) for _ in range(1500)]
    assert all(SPACE.is_valid(architecture) for architecture in drawn)
    for kind, node in itertools.product(("normal", "reduce"), (3, 5)):
        pairs = Counter(
            tuple(s for s in range(node) if a[f"{kind}_{s}_{node}"] != "none") for a in drawn
        )
        assert set(pairs) == set(itertools.combinations(range(node), 2))
        assert chisquare(list(pairs.values())).pvalue > 1e-3
        operations = Counter(a[f"{kind}_{s}_{node}"] for a in drawn for s in range(node))
        del operations["none"]
        assert len(operations) == 7
        assert chisquare(list(operations.values())).pvalue > 1e-3


def test_sampling_leaves_out_what_is_excluded() -> None:
    space = Darts(width=4, num_cells=3)
    space.exclude(["*=sep_conv_5x5", "normal_0_5=none", "normal_3_5=max_pool_3x3"])
    generator = torch.Generator().manual_seed(0)
    drawn = [space.sample(generator) for _ in range(100)]
    assert all(space.is_valid(a) and a["normal_0_5"] != "none" for a in drawn)
    others = Counter(s for a in drawn for s in range(1, 5) if a[f"normal_{s}_5"] != "none")
    # node 3 has five operations left, the others six
    assert chisquare([others[s] for s in (1, 2, 3, 4)], [600 / 23, 600 / 23, 500 / 23, 600 / 23])


def test_a_narrow_range_of_costs_is_sampled() -> None:
    cost = random_cost(1)
    low, high = reachable(SPACE, cost)
    low, high = low + 0.1 * (high - low), low + 0.11 * (high - low)
    sampler = RangeSampler(SPACE, cost, low, high)
    generator = torch.Generator().manual_seed(0)
    drawn = {sampler.sample(generator) for _ in range(20)}
    assert len(drawn) == 20
    assert all(SPACE.is_valid(a) and low <= cost.of(a) <= high for a in drawn)


# ---- text


def test_the_published_genotype_round_trips() -> None:
    space = Darts()
    architecture = space.from_string(DARTS_V2)
    assert architecture["normal_0_4"] == "skip_connect"
    assert architecture["normal_2_5"] == "dil_conv_3x3"
    assert sum(option != "none" for _, option in architecture) == 16
    assert space.to_string(architecture) == SORTED
    assert space.from_string(SORTED) == architecture


def test_every_architecture_has_a_text() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        architecture = SPACE.sample(generator)
        assert SPACE.from_string(SPACE.to_string(architecture)) == architecture


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Genotype(", "Genome(", "is not of the form Genotype"),
        ("Genotype(", "__import__('os').system(", "is not of the form Genotype"),
        (")", "", "is not of the form Genotype"),
        ("reduce_concat", "normal_concat", "is not of the form Genotype"),
        ("[2, 3, 4, 5]", "[3, 4, 5]", r"normal_concat of the genotype is \[3, 4, 5\]; only \[2,"),
        ("[2, 3, 4, 5]", "open('x')", "neither a list nor a range"),
        ("[2, 3, 4, 5]", "range('x')", "neither a list nor a range"),
        ("('sep_conv_3x3', 0)", "('sep_conv_3x3', True)", "is not of the form \\('op', node"),
        ("('sep_conv_3x3', 0)", "('sep_conv_7x7', 0)", "'sep_conv_7x7' of the genotype is unknown"),
        ("('sep_conv_3x3', 0)", "('none', 0)", "'none' of the genotype is unknown"),
        ("('sep_conv_3x3', 0)", "('sep_conv_3x3', 2)", "node 2 of normal reads node 2"),
        ("('sep_conv_3x3', 0)", "('sep_conv_3x3', 1)", "node 2 of normal reads node 1"),
        ("('sep_conv_3x3', 0), ", "", "normal of the genotype has 6 operations; it must have 2"),
    ],
)
def test_other_texts_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Darts().from_string(DARTS_V2.replace(old, new))


# ---- networks


def test_parameters_are_those_of_the_official_code() -> None:
    """DARTS_V2 with 20 cells of width 36, without the auxiliary head; and the search network."""
    space = Darts(width=36, num_cells=20)
    network = space.build_network(space.from_string(DARTS_V2), 10)
    assert sum(p.numel() for p in network.parameters()) == 3_349_342
    assert sum(p.numel() for p in Darts().build_supernet(10).parameters()) == 1_930_618


def test_a_cell_computes_its_graph() -> None:
    """Operations without weights, so that the expected value can be written down."""
    genes = "[('skip_connect', 0), ('skip_connect', 1), ('avg_pool_3x3', 0), ('skip_connect', 2), "
    genes += "('skip_connect', 1), ('skip_connect', 3), ('max_pool_3x3', 0), ('skip_connect', 4)]"
    fields = (f"{kind}={genes}, {kind}_concat=range(2, 6)" for kind in ("normal", "reduce"))
    text = f"Genotype({', '.join(fields)})"
    space = Darts(width=4, num_cells=3, img_size=8, pool_norm=False)
    cell = space.build_network(space.from_string(text), 10).eval().blocks[0]
    x, y = torch.randn(2, 2, 12, 8, 8)
    a, b = (entry(image) for entry, image in zip(cell.entries, (x, y), strict=True))
    box, ones = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 8, 8)
    mean = torch.nn.functional.conv2d(a.flatten(0, 1)[:, None], box, padding=1)
    mean = (mean / torch.nn.functional.conv2d(ones, box, padding=1)).view_as(a)
    padded = torch.nn.functional.pad(a, (1, 1, 1, 1), value=-math.inf)
    most = padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((-2, -1))
    two = a + b
    three = mean + two
    four = b + three
    five = most + four
    torch.testing.assert_close(cell(x, y), torch.cat([two, three, four, five], dim=1))


def test_cells_read_the_two_before_and_reductions_halve() -> None:
    space = Darts(width=4, num_cells=6, img_size=16)
    network = space.build_network(space.sample(torch.Generator().manual_seed(0)), 10).eval()
    assert space.reductions == (2, 4)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    with torch.no_grad():
        images = torch.randn(2, 3, 16, 16)
        network(images)
        stem = network.stem(images)
    outputs = [stem, stem, *(output for _, output in seen)]
    for index, ((before, last, _), _) in enumerate(seen):
        assert torch.equal(before, outputs[index]) and torch.equal(last, outputs[index + 1])
    shapes = [tuple(output.shape[1:]) for _, output in seen]
    assert shapes == [(16, 16, 16)] * 2 + [(32, 8, 8)] * 2 + [(64, 4, 4)] * 2


@pytest.mark.parametrize("side", [7, 10, 13])
def test_images_of_any_side(side: int) -> None:
    space = Darts(width=4, num_cells=4, img_size=side)
    network = space.build_network(space.sample(torch.Generator().manual_seed(1)), 3)
    assert network(torch.randn(2, 3, side, side)).shape == (2, 3)


def test_pools_have_no_norm_where_none_is_wanted() -> None:
    architecture = Darts().from_string(DARTS_V2)
    for pool_norm in (True, False):
        space = Darts(pool_norm=pool_norm)
        network = space.build_network(space.architecture(dict(architecture)), 10)
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert sum(not norm.affine for norm in norms) == (10 if pool_norm else 0)
        searched = space.build_supernet(10)
        cells = [m for b in searched.blocks for m in b.modules()]
        assert not any(getattr(m, "affine", False) for m in cells)


def test_the_first_of_two_separable_convolutions_has_the_stride() -> None:
    """As in the official code, where `sep_conv` reduces before it convolves again."""
    operation = SeparableConv(4, 5, stride=2, affine=True)
    assert operation.first.depthwise.stride == (2, 2)
    assert operation.second.depthwise.stride == (1, 1)


def test_the_auxiliary_head_reads_the_second_reduction() -> None:
    space = Darts(width=36, num_cells=20)
    network = space.build_network(space.from_string(DARTS_V2), 10)
    assert network.auxiliary is not None and network.auxiliary.after == 13
    head = network.auxiliary.build(10)
    assert head(torch.randn(2, 576, 8, 8)).shape == (2, 10)
    assert [m.stride for m in head if isinstance(m, torch.nn.AvgPool2d)] == [3]
    # the official head has 476,426 parameters here: 3,825,768 with the network
    assert sum(p.numel() for p in head.parameters()) == 3_825_768 - 3_349_342
    for side in (2, 4, 7, 16):
        assert AuxiliaryHead(8, side, 5).eval()(torch.randn(2, 8, side, side)).shape == (2, 5)
    for img_size, fits in ((5, True), (4, False)):
        space = Darts(width=4, num_cells=3, img_size=img_size)
        network = space.build_network(space.from_string(DARTS_V2), 10)
        if fits:
            images = torch.randn(2, 3, img_size, img_size)
            assert [y.shape for y in WithAuxiliary(network)(images)] == [(2, 10)] * 2
        else:
            with pytest.raises(ValueError, match="side 2 or more, not of 1: set recipe.aux_weight"):
                WithAuxiliary(network)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_cells": 2}, "num_cells must be 3 or more; got 2"),
        ({"width": 0}, "width must be 2 or more; got 0"),
        ({"stem_multiplier": 0}, "stem_multiplier must be 1 or more; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Darts(**settings)


def test_a_file_holds_all_there_is(tmp_path) -> None:
    architecture = SPACE.sample(torch.Generator().manual_seed(5))
    architecture.save(tmp_path / "architecture.json")
    again = Architecture.load(tmp_path / "architecture.json")
    assert SearchSpace.of(again).check(again) == architecture
    assert json.loads(again.settings)["num_cells"] == 3
