from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from supernet.choice import Architecture
from supernet.mixed_ops.base import MixedOp
from supernet.spaces.mbconv import MBConv


def everywhere(space: MBConv, option: str) -> Architecture:
    return space.architecture({choice.name: option for choice in space.choices})


def test_the_stages_are_those_of_proxylessnas() -> None:
    space = MBConv()
    assert len(space.choices) == 21
    free = {"zero"}
    operations = {f"k{kernel}_e{expansion}" for kernel in (3, 5, 7) for expansion in (3, 6)}
    may_vanish = [set(choice.options) == operations | free for choice in space.choices]
    # the first block of every stage changes the width and cannot vanish
    assert may_vanish == [layer > 0 for layers in (4, 4, 4, 4, 4, 1) for layer in range(layers)]
    assert all(set(choice.options) >= operations for choice in space.choices)


def test_shapes_along_the_network_at_224() -> None:
    space = MBConv()
    network = space.build_network(everywhere(space, "k3_e3"), 1000).eval()
    shapes = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:3])))
    with torch.no_grad():
        x = torch.zeros(1, 3, 224, 224)
        assert network.stem(x).shape == (1, 32, 112, 112)
        assert network.forward_features(x).shape == (1, 1280, 7, 7)
    stages = [(24, 56)] * 4 + [(40, 28)] * 4 + [(80, 14)] * 4 + [(96, 14)] * 4 + [(192, 7)] * 4
    assert shapes == [(16, 112), *stages, (320, 7)]


def test_mobilenet_v2_is_one_of_its_networks() -> None:
    """Stages, kernel 3 and expansion 6 of MobileNetV2 give timm's network, weights for weights."""
    stages = [(24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
    space = MBConv(stages=stages, kernels=(3,), expansions=(6,))
    ours = space.build_network(everywhere(space, "k3_e6"), 1000).eval()
    theirs = timm.create_model("mobilenetv2_100").eval()
    assert sum(p.numel() for p in ours.parameters()) == 3_504_872
    # both list their layers in the order of the forward pass
    pairs = list(zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(("option", "kernel", "expansion"), [("k5_e3", 5, 3), ("k7_e6", 7, 6)])
def test_an_option_says_kernel_and_expansion(option: str, kernel: int, expansion: int) -> None:
    space = MBConv(stages=[(16, 2, 2)])
    network = space.build_network(everywhere(space, option), 10)
    for block in network.blocks[1:]:
        depthwise = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert [m.kernel_size for m in depthwise] == [(kernel, kernel)]
        assert depthwise[0].in_channels == 16 * expansion


def test_zero_leaves_the_identity() -> None:
    space = MBConv(stages=[(16, 3, 2)])
    options = {"stage1_0": "k3_e3", "stage1_1": "zero", "stage1_2": "zero"}
    network = space.build_network(space.architecture(options), 10)
    x = torch.randn(1, 16, 4, 4)
    assert all(torch.equal(block(x), x) for block in network.blocks[2:])
    assert not list(network.blocks[2:].parameters())


def test_a_stage_that_keeps_width_and_resolution_may_vanish_entirely() -> None:
    space = MBConv(first_chs=16, stages=[(16, 2, 1), (24, 1, 2)])
    assert ["zero" in choice.options for choice in space.choices] == [True, True, False]


def test_the_form_for_small_images_keeps_more_resolution() -> None:
    space = MBConv(img_size=32, stem_stride=1, stages=[(16, 2, 1), (24, 2, 2)], head_chs=32)
    network = space.build_network(everywhere(space, "k3_e3"), 10).eval()
    assert network.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 32, 16, 16)


def test_the_supernet_holds_every_candidate() -> None:
    space = MBConv(stages=[(16, 2, 2), (24, 2, 2)], head_chs=32)
    mixed = [m for m in space.build_supernet(10).modules() if isinstance(m, MixedOp)]
    assert [tuple(m.candidates) for m in mixed] == [choice.options for choice in space.choices]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": [(16, 2)]}, r"a stage is \[width, layers, stride\]; got \[16, 2\]"),
        ({"act": "relu_six"}, "act='relu_six' is no activation of timm"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MBConv(**settings)


def test_the_diagram_is_a_chain_with_every_block() -> None:
    space = MBConv(stages=[(16, 2, 2), (24, 1, 1)], head_chs=32)
    options = {"stage1_0": "k5_e3", "stage1_1": "zero", "stage2_0": "k3_e6"}
    diagram = space.diagram(space.architecture(options))
    assert diagram.nodes == (
        "image", "stem 32", "k3 e1 16", "k5 e3 16 /2", "skip", "k3 e6 24", "head 32",
    )  # fmt: skip
    assert [edge[:2] for edge in diagram.edges] == [(i, i + 1) for i in range(6)]


def test_equal_operations_do_not_lose_to_absence_one_by_one() -> None:
    space = MBConv(stages=[[24, 2, 2]])
    first, second = space.choices
    zero = second.index("zero")
    logits = torch.zeros(len(second.options), dtype=torch.float64)
    logits[zero] = 1.0  # P(zero) = e / (e + 6), the most probable option by far
    p = torch.softmax(logits, 0)
    assert p.argmax() == zero and p[zero] < 0.5
    scores = space.scores({first.name: torch.zeros(6), second.name: p.log()})
    found = scores[second.name]
    present = [i for i in range(len(p)) if i != zero]
    assert found[zero].exp() == pytest.approx(p[zero])
    assert found[present].exp().tolist() == pytest.approx([1 - float(p[zero])] * len(present))
    assert torch.equal(scores[first.name], torch.zeros(6))
    logits[0] += 0.5  # among operations the ratio of their probabilities decides
    p = torch.softmax(logits, 0)
    found = space.scores({second.name: p.log()})[second.name]
    assert found[0] - found[1] == pytest.approx(0.5)
    assert found[0].exp() == pytest.approx(1 - float(p[zero]))
