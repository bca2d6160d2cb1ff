from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from latency.memory import PeakMemory, peak_memory
from latency.model import AdditiveCost, macs_cost, params_cost
from latency.sites import Site, trace, trace_architecture
from supernet.choice import Architecture
from supernet.derive import derive, reachable
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import MixedOp, PathWeights, one_hot
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.partial_channels import PartialChannels
from supernet.report.diagram import draw
from supernet.sampling import RangeSampler
from supernet.space import SearchSpace
from supernet.spaces.amoebanet import AmoebaNet
from supernet.spaces.blocks import BlockSpace
from supernet.spaces.enas_micro import ENASMicro
from supernet.spaces.nasnet import NASNet
from supernet.spaces.pnas import PNAS

SMALL: dict[str, Any] = {"width": 2, "num_cells": 3, "num_blocks": 2, "img_size": 8}
CLASSES: list[type[BlockSpace]] = [NASNet, PNAS, AmoebaNet, ENASMicro]
classes = pytest.mark.parametrize("cls", CLASSES)
SHAPE = (1, 3, 8, 8)


class Few(NASNet):
    """Small enough for all architectures to be tried."""

    operations = ("sep_conv_3x3", "identity")
    kinds = ("cell",)


class FewWithLooseInputs(Few):
    combinations = ("add",)
    loose_inputs = True


def sites_of(space: SearchSpace) -> list[Site]:
    return trace(space.build(MixedOp, 10, search=False), space.choices, SHAPE)


def everything(space: SearchSpace) -> list[Architecture]:
    names = [choice.name for choice in space.decided]
    options = itertools.product(*(choice.options for choice in space.decided))
    return [space.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]


def read(architecture: Architecture, kind: str) -> set[int]:
    """The states that some side of a kind of cell reads."""
    sides = [o for n, o in architecture if n.startswith(kind) and n.endswith(("left", "right"))]
    return {int(option[0]) for option in sides}


# ---- what there is


@pytest.mark.parametrize(
    ("cls", "num_operations", "num_kinds", "num_combinations"),
    [(NASNet, 13, 2, 2), (PNAS, 8, 1, 1), (AmoebaNet, 8, 2, 1), (ENASMicro, 5, 2, 1)],
)
def test_the_size_is_the_papers(
    cls: type[BlockSpace], num_operations: int, num_kinds: int, num_combinations: int
) -> None:
    cell = 1
    for inputs in (2, 3, 4, 5, 6):
        cell *= inputs**2 * num_operations**2 * num_combinations
    assert cls().size == cell**num_kinds


@pytest.mark.parametrize("cls", [Few, FewWithLooseInputs])
def test_the_size_is_that_of_all_that_can_be_listed(cls: type[BlockSpace]) -> None:
    space = cls(**SMALL)
    every = everything(space)
    assert len(set(every)) == len(every) == space.size
    assert all(space.is_valid(architecture) for architecture in every)


def test_the_five_predictions_of_a_block() -> None:
    genes = NASNet().genes
    assert [gene.name for gene in genes[:5]] == [
        "normal_2_left_input", "normal_2_right_input",
        "normal_2_left_operation", "normal_2_right_operation", "normal_2_combine",
    ]  # fmt: skip
    assert [len(gene.options) for gene in genes[-5:]] == [6, 6, 13, 13, 2]
    assert len(genes) == 2 * 5 * 5


@classes
def test_genes_stand_for_an_architecture(cls: type[BlockSpace]) -> None:
    space, generator = cls(), torch.Generator().manual_seed(0)
    for _ in range(5):
        genes = {g.name: g.options[int(torch.randint(len(g.options), (1,)))] for g in space.genes}
        assert space.encode(space.decode(genes)) == genes
        architecture = space.sample(generator)
        assert space.decode(space.encode(architecture)) == architecture
    with pytest.raises(ValueError, match="no option given for gene '.*_2_left_input'"):
        space.decode({})
    with pytest.raises(ValueError, match="no gene 'some'; valid: "):
        space.decode({**genes, "some": "0"})
    with pytest.raises(ValueError, match="has no option '9'; valid: 0, 1"):
        space.decode({**genes, space.genes[0].name: "9"})


def test_what_is_loose_follows_and_is_not_to_be_said_otherwise() -> None:
    space = PNAS(**{**SMALL, "num_blocks": 3})
    options = dict(space.sample(torch.Generator().manual_seed(0)))
    options["cell_3_left"] = options["cell_3_right"] = "0_identity"
    options["cell_4_left"] = options["cell_4_right"] = "3_identity"
    decided = {choice.name: options[choice.name] for choice in space.decided}
    architecture = space.architecture(decided)
    assert architecture["cell_2_end"] == "loose" and architecture["cell_3_end"] == "used"
    wrong = {**architecture.to_dict(), "choices": {**decided, "cell_2_end": "used"}}
    with pytest.raises(ValueError, match="'cell_2_end' of the architecture is 'used'; with its"):
        SearchSpace.of(Architecture.from_dict(wrong))
    pairs = tuple(wrong["choices"].items())
    assert not space.is_valid(Architecture(space.id, space.settings, pairs))


@classes
def test_sampling_is_uniform(cls: type[BlockSpace]) -> None:
    space, generator = cls(**SMALL), torch.Generator().manual_seed(0)
    drawn = [space.sample(generator) for _ in range(600)]
    assert all(space.is_valid(architecture) for architecture in drawn)
    for choice in space.decided:
        counts = Counter(architecture[choice.name] for architecture in drawn)
        assert chisquare([counts[option] for option in choice.options]).pvalue > 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"num_cells": 2}, {"width": 1}, {"num_blocks": 0}, {"stem_multiplier": 0}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} must be . or more; got {value}"):
        PNAS(**settings)


def test_a_file_holds_all_there_is(tmp_path) -> None:
    architecture = NASNet(**SMALL).sample(torch.Generator().manual_seed(5))
    architecture.save(tmp_path / "architecture.json")
    again = Architecture.load(tmp_path / "architecture.json")
    assert SearchSpace.of(again).check(again) == architecture
    assert json.loads(again.settings)["num_blocks"] == 2


# ---- networks


@classes
def test_one_hot_supernet_is_the_derived_network(
    cls: type[BlockSpace], unsettle: Callable[[nn.Module], nn.Module]
) -> None:
    space = cls(**SMALL)
    supernet = unsettle(space.build_supernet(10)).eval()
    images, generator = torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(0)
    widths = set()
    for _ in range(4):
        architecture = space.sample(generator)
        network = space.build_network(architecture, 10).eval()
        inherit_weights(supernet, network, dict(architecture))
        weights = one_hot(architecture, space.decided)
        for mode in (True, False):
            supernet.train(mode), network.train(mode)
            with torch.no_grad():
                expected = network(images)
                error = (supernet(images, weights) - expected).abs().max()
            assert error < 1e-5 < expected.abs().max()
        widths.add(network.feature_info[0]["num_chs"])
    assert len(widths) > 1  # loose ends or not


@pytest.mark.parametrize(
    "cls", [FewWithLooseInputs, *(pytest.param(cls, marks=pytest.mark.slow) for cls in CLASSES)]
)
def test_sites_are_those_of_derived_networks(cls: type[BlockSpace]) -> None:
    space = cls(**SMALL)
    sites = sites_of(space)
    keys = {site.key for site in sites}
    macs, params = macs_cost(space.choices, sites), params_cost(space.choices, sites)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        architecture = space.sample(generator)
        pairs = {(None, None), *architecture}
        own = trace_architecture(space, architecture, 10, SHAPE)
        chosen = Counter(site.key for site in sites if (site.choice, site.option) in pairs)
        assert chosen == Counter(site.key for site in own) and set(chosen) <= keys
        network = space.build_network(architecture, 10)
        assert params.of(architecture) == sum(p.numel() for p in network.parameters())
        assert macs.of(architecture) == sum(site.macs for site in own)


def test_the_output_is_what_no_block_reads() -> None:
    """Operations without weights, so that the expected value can be written down."""
    space = PNAS(**{**SMALL, "num_blocks": 4})
    sides = ["0_identity", "1_identity", "2_max_pool_3x3", "0_identity"]
    sides += ["1_identity", "1_identity", "3_identity", "2_identity"]
    names = [choice.name for choice in space.decided]
    architecture = space.architecture(dict(zip(names, sides, strict=True)))
    cell = space.build_network(architecture, 10).eval().blocks[0]
    x, y = torch.randn(2, 2, 6, 8, 8)
    a, b = (entry(image) for entry, image in zip(cell.entries, (x, y), strict=True))
    padded = nn.functional.pad(a + b, (1, 1, 1, 1), value=-torch.inf)
    three = padded.unfold(2, 3, 1).unfold(3, 3, 1).amax((-2, -1)) + a
    five = three + (a + b)
    torch.testing.assert_close(cell(x, y), torch.cat([b + b, five], dim=1))


@pytest.mark.parametrize("stride", [1, 2])
def test_an_entry_is_a_convolution_of_the_whole_input(stride: int) -> None:
    """ReLU, 1x1 convolution (at stride 2, two of them that read every other pixel), batch norm."""
    space = PNAS(**{**SMALL, "num_cells": 6, "num_blocks": 3})
    options = {c.name: "0_identity" for c in space.decided}  # all three states are loose
    network = space.build_network(space.architecture(options), 10).eval()
    entry = network.blocks[3 if stride == 2 else 1].entries[2 - stride]
    parts = [*(layer.reach for layer in entry.layers.values()), entry.last]
    assert len(parts) == 3
    x = torch.randn(2, sum(part[1].in_channels if stride == 1 else part.even.in_channels
                           for part in parts), 8, 8)  # fmt: skip
    rectified = x.relu()
    if stride == 1:
        expected = nn.functional.conv2d(rectified, torch.cat([p[1].weight for p in parts], 1))
    else:
        even = torch.cat([p.even.weight for p in parts], 1)
        odd = torch.cat([p.odd.weight for p in parts], 1)
        halves = ((rectified, even), (rectified[:, :, 1:, 1:], odd))
        expected = torch.cat([nn.functional.conv2d(*half, stride=2) for half in halves], dim=1)
    torch.testing.assert_close(entry(x), entry.norm(expected))


def test_reductions_halve_and_inputs_that_nobody_reads_are_kept() -> None:
    space = ENASMicro(width=2, num_cells=5, num_blocks=2, img_size=16)
    options = {c.name: "0_max_pool_3x3" for c in space.decided}
    network = space.build_network(space.architecture(options), 10).eval()
    shapes = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, y: shapes.append(tuple(y.shape[1:])))
    with torch.no_grad():
        network(torch.randn(1, 3, 16, 16))
    # loose are input 1 and both states; the last cell has a place for input 0, too
    assert shapes == [(6, 16, 16), (12, 8, 8), (12, 8, 8), (24, 4, 4), (32, 4, 4)]


@pytest.mark.parametrize("side", [7, 10])
def test_images_of_any_side(side: int) -> None:
    space = NASNet(**{**SMALL, "img_size": side})
    network = space.build_network(space.sample(torch.Generator().manual_seed(1)), 3)
    assert network(torch.randn(2, 3, side, side)).shape == (2, 3)


# ---- mixtures


def test_looseness_is_the_probability_that_nobody_reads() -> None:
    """Against the mean over all architectures, each as probable as its sides."""
    space = FewWithLooseInputs(**SMALL)
    generator = torch.Generator().manual_seed(0)
    p = {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64).softmax(0)
        for c in space.decided
    }
    expected: dict[str, float] = Counter()
    for architecture in everything(space):
        mass = 1.0
        for choice in space.decided:
            mass *= float(p[choice.name][choice.index(architecture[choice.name])])
        for state in (0, 1, 2):
            expected[f"cell_{state}_end"] += mass * (state not in read(architecture, "cell"))
    shares = space.shares(p)
    assert list(shares) == [choice.name for choice in space.choices]
    weights = {n: PathWeights(tuple(range(len(v))), v) for n, v in p.items()}
    for end in space.loose_ends["cell"]:
        loose = expected[end.choice.name]
        assert shares[end.choice.name].tolist() == pytest.approx([1 - loose, loose])
        assert float(end.looseness(weights)) == pytest.approx(loose)


def test_gates_learn_from_what_is_loose() -> None:
    """Forward an end is loose or not; backward the sides' logits hear of it."""
    space, generator = FewWithLooseInputs(**SMALL), torch.Generator().manual_seed(0)
    heard = 0
    for _ in range(10):
        logits = {c.name: torch.zeros(len(c.options), requires_grad=True) for c in space.decided}
        sample = BinaryGate().for_architecture_step(logits, generator, 0.5)
        total = torch.zeros(())
        for end in space.loose_ends["cell"]:
            value = torch.as_tensor(end.looseness(sample.weights))
            assert min(abs(value), abs(1 - value)) < 1e-6
            total = total + value
        if total.requires_grad:
            total.backward()
            heard += any(v.grad is not None and bool(v.grad.any()) for v in logits.values())
    assert heard


def test_partial_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="mixed_op=partial_channels needs"):
        Few(**SMALL).build_supernet(10, PartialChannels(2).build)


# ---- costs


@pytest.fixture(scope="module")
def few() -> tuple[BlockSpace, list[Site], list[Architecture]]:
    space = Few(**SMALL)
    return space, sites_of(space), everything(space)


def test_derivation_under_a_budget_is_the_best_of_all(few: Any) -> None:
    space, sites, every = few
    cost = params_cost(space.choices, sites)
    costs = {architecture: cost.of(architecture) for architecture in every}
    assert reachable(space, cost) == (min(costs.values()), max(costs.values()))
    generator = torch.Generator().manual_seed(0)
    scores = {
        c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        for c in space.decided
    }

    def worth(architecture: Architecture) -> float:
        return sum(float(v[space.by_name[n].index(architecture[n])]) for n, v in scores.items())

    for budget in torch.tensor(sorted(set(costs.values()))).quantile(torch.tensor([0.1, 0.4])):
        found = derive(space, scores, cost, float(budget))
        assert space.is_valid(found) and cost.of(found) <= budget
        best = max(worth(a) for a, value in costs.items() if value <= budget)
        assert worth(found) == pytest.approx(best, abs=1e-9)


def test_a_range_of_costs_is_sampled_uniformly(few: Any) -> None:
    """Although what is loose is not counted beforehand."""
    space, sites, every = few
    cost = macs_cost(space.choices, sites)
    costs = sorted(cost.of(architecture) for architecture in every)
    low, high = costs[len(costs) // 4], costs[len(costs) // 2]
    inside = [architecture for architecture in every if low <= cost.of(architecture) <= high]
    sampler, generator = RangeSampler(space, cost, low, high), torch.Generator().manual_seed(0)
    drawn = [sampler.sample(generator) for _ in range(400)]
    assert all(low <= cost.of(architecture) <= high for architecture in drawn)
    for name in ("cell_2_end", "cell_3_left"):
        options = Counter(architecture[name] for architecture in inside)
        found = Counter(architecture[name] for architecture in drawn)
        assert len(options) > 1
        expected = [400 * count / len(inside) for count in options.values()]
        assert chisquare([found[option] for option in options], expected).pvalue > 1e-4


def test_an_even_mixture_costs_the_mean_of_all(few: Any) -> None:
    space, sites, every = few
    cost: AdditiveCost = macs_cost(space.choices, sites)
    even = {
        c.name: torch.full((len(c.options),), 1 / len(c.options), dtype=torch.float64)
        for c in space.decided
    }
    mean = sum(cost.of(architecture) for architecture in every) / len(every)
    assert cost.expected(space.shares(even)).item() == pytest.approx(mean)


@pytest.mark.parametrize("cls", [pytest.param(Few, marks=pytest.mark.slow), FewWithLooseInputs])
def test_peak_memory_is_that_of_the_network_and_bounded_from_below(cls: type[BlockSpace]) -> None:
    space = cls(**SMALL)
    cost, generator = PeakMemory(space, 10, SHAPE), torch.Generator().manual_seed(0)
    for _ in range(4):
        architecture = space.sample(generator)
        peak = peak_memory(space.build_network(architecture, 10), SHAPE)
        kept = torch.rand(len(space.choices), generator=generator) < 0.6
        part = {n: o for (n, o), keep in zip(architecture, kept.tolist(), strict=True) if keep}
        assert cost.at_least({}) <= cost.at_least(part) <= cost.of(architecture) == peak


# ---- the report


def test_the_diagram_shows_both_sides_of_each_block() -> None:
    space = NASNet(**SMALL)
    options = {c.name: "0_identity" for c in space.decided if not c.name.endswith("combine")}
    options |= {c.name: "add" for c in space.decided if c.name.endswith("combine")}
    options |= {"normal_3_left": "2_sep_conv_7x7", "normal_3_combine": "concat"}
    architecture = space.architecture(options)
    diagram = space.diagram(architecture)
    assert diagram.nodes[:5] == ("normal: input 0", "input 1", "2", "3 concat", "output")
    own = [edge for edge in diagram.edges if edge[0] < 5]
    assert own == [
        (0, 2, "identity"), (0, 2, "identity"), (2, 3, "sep_conv_7x7"), (0, 3, "identity"),
        (3, 4, ""),
    ]  # fmt: skip
    assert [edge[:2] for edge in diagram.edges if edge[2] == ""] == [(3, 4), (7, 9), (8, 9)]
    drawing = draw(space, architecture)
    assert len(drawing.boxes) == 10 and len(drawing.arcs) == len(diagram.edges)
    assert {item.label for item in drawing.legend} == {"identity", "sep_conv_7x7"}
