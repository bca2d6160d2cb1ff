from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from scipy.stats import chisquare
from torch import nn
from torch.nn.functional import interpolate

from latency.sites import trace_architecture
from latency.traced import TracedCost
from supernet.choice import Architecture
from supernet.derive import Infeasible, check_space, reachable
from supernet.export import RENAMES
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import PathWeights, one_hot
from supernet.space import SearchSpace
from supernet.spaces.efficientnet_scaling import EfficientNetScaling
from supernet.strategies.grid import Grid
from supernet.strategies.trials import make_generator

# width, depth, resolution (the official code's `efficientnet_params`), and 1e9 multiply-accumulates
# (the paper's table 2)
FAMILY = {
    "b0": (1.0, 1.0, 224, 0.39), "b1": (1.0, 1.1, 240, 0.70), "b2": (1.1, 1.2, 260, 1.0),
    "b3": (1.2, 1.4, 300, 1.8), "b4": (1.4, 1.8, 380, 4.2), "b5": (1.6, 2.2, 456, 9.9),
    "b6": (1.8, 2.6, 528, 19), "b7": (2.0, 3.1, 600, 37),
}  # fmt: skip
B0 = [  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
]  # fmt: skip
BEST = {"depth": "120%", "width": "110%", "resolution": "115%"}
SMALL: dict[str, Any] = {
    "img_size": 16, "stem_chs": 8, "head_chs": 32, "divisor": 2,
    "stages": ["ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k3_s2_e4_c16_se0.25"],
}  # fmt: skip


def single(name: str) -> tuple[EfficientNetScaling, Architecture]:
    """One network of the official family."""
    width, depth, resolution, _ = FAMILY[name]
    space = EfficientNetScaling(
        resolution=resolution, depths=[depth], widths=[width], resolutions=[1.0], tolerance=None
    )
    return space, space.sample(torch.Generator())


def coefficients(options: Any) -> tuple[float, ...]:
    return tuple(int(dict(options)[n][:-1]) / 100 for n in ("depth", "width", "resolution"))


def triples(space: EfficientNetScaling) -> set[tuple[float, ...]]:
    return {coefficients(way) for way in space.ways()[0]}


def test_valid_triples_are_those_of_equation_3() -> None:
    space = EfficientNetScaling()
    grid = itertools.product(
        (1, 1.2, 1.4, 1.6, 1.8, 2), (1, 1.1, 1.2, 1.3, 1.4), (1, 1.15, 1.3)
    )
    valid = {(a, b, c) for a, b, c in grid if 1.8 <= a * b**2 * c**2 <= 2.2}
    assert space.size == 90 and len(valid) == 13
    assert triples(space) == valid and (1.2, 1.1, 1.15) in valid
    every = itertools.product(*(c.options for c in space.choices))
    made = [space.architecture(dict(zip(BEST, options, strict=True))) for options in every]
    assert {coefficients(a) for a in made if space.is_valid(a)} == valid
    assert space.is_valid(check_space(space))


def test_the_bounds_are_within() -> None:
    """2 * 0.9 and 2 * 1.1 exactly, whatever rounding makes of their logarithms."""
    edges = [1.8, 2.2]
    space = EfficientNetScaling(depths=[1.79, *edges, 2.21], widths=[1.0], resolutions=[1.0])
    assert triples(space) == {(1.8, 1, 1), (2.2, 1, 1)}
    free = EfficientNetScaling(tolerance=None)
    assert len(free.ways()[0]) == free.size == 90


def test_sampling_is_uniform() -> None:
    space, generator = EfficientNetScaling(), torch.Generator().manual_seed(0)
    space.exclude(["depth=200%"])
    counts = Counter(space.sample(generator) for _ in range(600))
    assert len(counts) == 12 == len(space.ways()[0])
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_a_grid_tries_each_triple_once() -> None:
    space = EfficientNetScaling(**SMALL)
    problem: Any = SimpleNamespace(
        space=space, is_feasible=space.is_valid, accelerator=SimpleNamespace(num_processes=1)
    )
    tried = [a for batch in Grid().propose(problem, make_generator(0)) for a in batch]
    assert len(tried) == 13 and {coefficients(a) for a in tried} == triples(space)
    assert tried == sorted(tried, key=coefficients)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name > "b4" else []) for name in FAMILY],
)
def test_the_official_family_has_the_tensors_of_timm(name: str) -> None:
    """In order, which is the same in both; B0 has 5,288,548 parameters."""
    space, architecture = single(name)
    with torch.device("meta"):
        ours = space.build_network(architecture, 1000)
        theirs = timm.create_model(f"efficientnet_{name}")
    assert count(ours) == count(theirs)
    if name == "b0":
        assert count(ours) == 5_288_548
    shapes = [[value.shape for value in n.state_dict().values()] for n in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.img_size == FAMILY[name][2]


def test_b1_computes_what_timms_does() -> None:
    space, architecture = single("b1")
    architecture = space.resized(architecture, {"resolution": 48})
    ours = SearchSpace.of(architecture).build_network(architecture, 10).eval()
    theirs = timm.create_model("efficientnet_b1", num_classes=10).eval()
    state = theirs.state_dict()
    for prefix, other in {**RENAMES, "blocks.": "blocks."}.items():
        for name, value in ours.state_dict().items():
            if name.startswith(prefix):
                value.copy_(state.pop(other + name.removeprefix(prefix)))
    assert not state
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("name", ["b0", "b3"])
def test_costs_are_those_of_the_paper(name: str) -> None:
    space, architecture = single(name)
    cost = TracedCost("macs", 1000, (1, 3, 224, 224))  # whatever comes, it reads its resolution
    assert cost.of(architecture) == pytest.approx(FAMILY[name][3] * 1e9, rel=0.03)


def rounded(chs: float) -> int:
    """To the nearest multiple of 8, and up where that is less than 90%."""
    nearest = 8 * math.floor(chs / 8 + 0.5)
    return nearest if nearest >= 0.9 * chs else nearest + 8


def costs(alpha: float, beta: float, gamma: float, phi: float, classes: int) -> tuple[int, int]:
    """(multiply-accumulates, parameters) by the formula, without a network."""
    depth, width = alpha**phi, beta**phi
    side = math.ceil(round(224 * gamma**phi) / 2)
    in_chs = rounded(32 * width)
    macs, params = side**2 * 27 * in_chs, (27 + 2) * in_chs
    for blocks, kernel, stride, expansion, chs in B0:
        for block in range(math.ceil(blocks * depth)):
            mid, out = expansion * in_chs, rounded(chs * width)
            if expansion > 1:
                macs += side**2 * in_chs * mid
                params += (in_chs + 2) * mid
            side = math.ceil(side / stride) if block == 0 else side
            squeezed = round(in_chs / 4)
            macs += side**2 * (kernel**2 * mid + mid * out) + 2 * mid * squeezed
            params += (kernel**2 + 2) * mid + (mid + 2) * out
            params += 2 * mid * squeezed + mid + squeezed
            in_chs = out
    head = rounded(1280 * width)
    macs += side**2 * in_chs * head + head * classes
    return macs, params + (in_chs + 2) * head + (head + 1) * classes


@pytest.mark.parametrize(("phi", "width"), [(0.5, "110%"), (1, "140%"), (2, "110%")])
def test_a_network_costs_what_its_coefficients_say(phi: float, width: str) -> None:
    space, options = EfficientNetScaling(), {**BEST, "width": width}
    architecture = SearchSpace.resized(space.architecture(options), {"phi": phi})
    shape = (1, 3, 224, 224)
    found = tuple(TracedCost(name, 1000, shape).of(architecture) for name in ("macs", "params"))
    assert found == costs(*coefficients(options), phi, 1000)


def test_the_family_costs_about_two_to_the_phi() -> None:
    """A little more, since numbers of blocks are rounded up; less so the larger they are."""
    base = costs(1, 1, 1, 0, 1000)[0]
    shares = [costs(1.2, 1.1, 1.15, phi, 1000)[0] / base / 2**phi for phi in range(1, 5)]
    assert all(0.95 < share < 1.3 for share in shares)
    assert shares == sorted(shares, reverse=True)


def test_the_ends_frame_all_costs() -> None:
    space = EfficientNetScaling(**SMALL)
    space.exclude(["depth=100%", "depth=120%"])
    cost = TracedCost("macs", 10, (1, 3, 16, 16))
    every = [cost.of(space.architecture(dict(way))) for way in space.ways()[0]]
    assert len(every) == 7 and reachable(space, cost) == (min(every), max(every))
    free = EfficientNetScaling(**SMALL, tolerance=None)
    assert [coefficients(a) for a in free.ends()] == [(1, 1, 1), (2, 1.4, 1.3)]


def test_resolutions_are_rounded_to_the_nearest_side() -> None:
    """Of 257.6 and 291.2."""
    space = EfficientNetScaling()
    sides = [space.side({"resolution": option}) for option in ("100%", "115%", "130%")]
    assert sides == [224, 258, 291]


def test_a_network_reads_its_own_resolution() -> None:
    space = EfficientNetScaling(**{**SMALL, "img_size": 32}, resolution=16, phi=2)
    network = space.build_network(space.architecture(BEST), 10).eval()
    assert network.img_size == 21 == round(16 * 1.15**2)
    seen = list[torch.Size]()
    network.blocks[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    for side in (16, 21, 32):
        images = torch.randn(2, 3, side, side)
        resized = interpolate(images, (21, 21), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert torch.equal(network(images), network(resized))
    assert all(shape[2:] == (11, 11) for shape in seen)
    half = network.to(torch.bfloat16)
    assert half(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_depths_and_widths_share_weights() -> None:
    """Few blocks are the first of many, few channels too."""
    space = EfficientNetScaling(**SMALL, tolerance=None)
    supernet, found = space.build_supernet(10), []
    for depth, width in (("200%", "140%"), ("100%", "120%")):
        options = {"depth": depth, "width": width, "resolution": "100%"}
        network = space.build_network(space.architecture(options), 10)
        inherit_weights(supernet, network, options)
        found.append(network)
    large, small = found
    assert [len(stage) for stage in large.blocks] == [2, 4]
    assert [len(stage) for stage in small.blocks] == [1, 2]
    for name, weight in small.state_dict().items():
        whole = large.state_dict()[name]
        assert torch.equal(weight, whole[tuple(slice(n) for n in weight.shape)]), name
    assert small.blocks[1][0].conv_pw.weight.shape == (40, 10, 1, 1)
    assert large.blocks[1][0].conv_pw.weight.shape == (48, 12, 1, 1)


def test_what_is_not_run_has_no_gradient() -> None:
    space = EfficientNetScaling(**SMALL, tolerance=None)
    supernet = space.build_supernet(10)
    options = {"depth": "100%", "width": "100%", "resolution": "115%"}
    weights = one_hot(space.architecture(options), space.choices)
    supernet(torch.randn(2, 3, 16, 16), weights).square().sum().backward()
    stage: Any = supernet.blocks[1]
    assert all(p.grad is None for block in stage.whole[2:] for p in block.parameters())
    grad = stage.whole[0].conv_pw.weight.grad
    assert grad[:32, :8].abs().sum() > 0 and not grad[32:].any() and not grad[:, 8:].any()
    assert not any(p.is_meta for p in supernet.parameters())


def test_the_supernet_refuses_mixtures() -> None:
    space = EfficientNetScaling(**SMALL)
    weights = one_hot(space.sample(torch.Generator().manual_seed(0)), space.choices)
    weights["width"] = PathWeights((0, 1), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="runs one option a choice; 'width' mixes 2"):
        space.build_supernet(10)(torch.randn(1, 3, 16, 16), weights)


def test_every_operation_is_a_site() -> None:
    space = EfficientNetScaling(**SMALL)
    architecture = space.architecture(BEST)
    sites = trace_architecture(space, architecture, 10, (1, 3, 16, 16))
    names = [type(site.module).__name__ for site in sites]
    assert names[0] == "Stem" and names.count("Sequential") == 2 and names[-1] == "Linear"
    assert sum(site.params for site in sites) == count(space.build_network(architecture, 10))
    other = space.architecture({**BEST, "resolution": "130%"})
    assert trace_architecture(space, other, 10, (1, 3, 16, 16))[0].key.op != sites[0].key.op


def test_the_diagram_shows_the_network() -> None:
    space = EfficientNetScaling(**SMALL, phi=2)
    diagram = space.diagram(space.architecture(BEST))
    assert diagram.nodes == (
        "image", "resize 21", "stem 10 /2", "2 x ds k3 e1 10", "3 x ir k3 e4 20 /2", "head 38",
    )  # fmt: skip
    assert diagram.edges == tuple((i, i + 1, "") for i in range(5))


def test_a_derived_network_is_a_timm_model() -> None:
    architecture = EfficientNetScaling(**SMALL, phi=2).architecture(BEST)
    content = json.loads(json.dumps(architecture.to_dict()))
    network = timm.create_model("supernet_derived", architecture=content, num_classes=7)
    assert network(torch.randn(2, 3, 21, 21)).shape == (2, 7)
    config = timm.data.resolve_model_data_config(network)
    assert config["input_size"] == (3, 21, 21)
    levels = timm.create_model("supernet_derived", architecture=content, features_only=True)
    assert [f.shape[1:] for f in levels(torch.randn(1, 3, 21, 21))] == [(10, 11, 11), (20, 6, 6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phi": -1}, r"phi must be 0 \(the base network\) or more; got -1"),
        ({"divisor": 0}, "divisor must be 1 or more, as 8 is; got 0"),
        ({"act": "magic"}, "act='magic' is no activation of timm; for example relu"),
        ({"widths": [1.0, 0.9]}, "widths must be coefficients of 1 or more, .* got 0.9"),
        ({"depths": [1.125]}, "depths must be .* in whole hundredths .* got 1.125"),
        ({"tolerance": 1.5}, "tolerance from 0 to below 1, or null; got .*tolerance=1.5"),
        ({"growth": 20.0}, "is within 0.1 of 20: of these coefficients they are 1 to 6.625"),
        ({"stages": ["k3_e6"]}, "stage 'k3_e6' is no block string of timm, such as ir_r2"),
        ({"stages": ["ir_r2_k3"]}, "stage 'ir_r2_k3' is no block string of timm, such as ir_r2"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientNetScaling(**settings)


def test_a_restriction_that_leaves_no_triple_is_refused() -> None:
    space = EfficientNetScaling()
    space.exclude(["width=100%", "width=110%", "resolution=100%", "depth=100%"])
    with pytest.raises(Infeasible, match="no valid architecture"):
        check_space(space)
