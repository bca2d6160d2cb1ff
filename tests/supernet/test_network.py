from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from supernet.choice import Architecture
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import one_hot
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.efficientnet_scaling import EfficientNetScaling
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.mnasnet import MnasNet
from supernet.spaces.nas_rl import NasRL
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos

STAGES_224 = [(24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)]
STAGES_SCALED = ["ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k3_s2_e4_c16_se0.25", "er_r1_k3_s1_e2_c24"]
STAGES_32 = [(24, 4, 1), *STAGES_224[1:]]


def narrow(stages: list[tuple[int, int, int]], stem_stride: int) -> MBConv:
    """At a quarter of the width and half the depth: what is compared does not depend on them."""
    stages = [(width // 4, (layers + 1) // 2, stride) for width, layers, stride in stages]
    return MBConv(stem_chs=8, stem_stride=stem_stride, first_chs=4, stages=stages, head_chs=64)


def scaled(*resolutions: float) -> EfficientNetScaling:
    return EfficientNetScaling(
        img_size=16, stem_chs=8, stages=STAGES_SCALED, head_chs=32, divisor=2, tolerance=None,
        depths=(1.0, 1.5, 2.0), widths=[1 + i / 10 for i in range(10)], resolutions=resolutions,
    )  # fmt: skip


FORMS = {  # space, side and number of the images
    "nasbench201": (NasBench201(widths=(8, 16, 32), num_cells=2), 16, 4),
    "darts": (Darts(width=2, num_cells=3), 8, 4),
    "enas_macro": (ENASMacro(width=4, num_layers=6), 16, 4),
    "nas_rl": (NasRL(num_layers=4), 8, 4),
    "mnasnet": (MnasNet(stem_chs=4, stages=[(4, 1, 1), (8, 2, 2)], head_chs=16), 16, 4),
    "nas_rl_strides": (NasRL(num_layers=4, strides=True), 8, 4),
    "efficientnet_scaling": (scaled(*(1 + i / 10 for i in range(16))), 16, 4),
    "mbconv_224": (narrow(STAGES_224, stem_stride=2), 64, 4),
    "mbconv_32": (narrow(STAGES_32, stem_stride=1), 32, 4),
    "spos": (Spos(stem_chs=8, stages=[(16, 2, 2), (24, 1, 1), (40, 2, 2)], head_chs=32), 16, 4),
}
FULL_FORMS = {
    "nasbench201_full": (NasBench201(), 32, 4),
    "darts_full": (Darts(), 32, 4),
    "enas_macro_full": (ENASMacro(), 32, 4),
    "mbconv_224_full": (MBConv(), 64, 2),
    "spos_full": (Spos(), 64, 2),
    "mbconv_32_full": (MBConv(img_size=32, stem_stride=1, stages=STAGES_32), 32, 2),
}
Unsettle = Callable[[nn.Module], nn.Module]
Form = tuple[SearchSpace, int, int]


@pytest.mark.parametrize(
    "form",
    [
        *FORMS.values(),
        *(pytest.param(form, marks=pytest.mark.slow) for form in FULL_FORMS.values()),
    ],
    ids=[*FORMS, *FULL_FORMS],
)
def test_one_hot_supernet_is_the_derived_network(form: Form, unsettle: Unsettle) -> None:
    space, side, batch = form
    supernet = space.build_supernet(10)
    images = torch.randn(batch, 3, side, side)
    generator = torch.Generator().manual_seed(0)
    unsettle(supernet)
    outputs = []
    for _ in range(20):
        architecture = space.sample(generator)
        weights = one_hot(architecture, space.choices)
        network = space.build_network(architecture, 10)
        inherit_weights(supernet, network, dict(architecture))
        for training in (False, True):
            supernet.train(training)
            network.train(training)
            with torch.no_grad():
                outputs.append(network(images))
                assert (outputs[-1] - supernet(images, weights)).abs().max() < 1e-5
        # training moved the running statistics of both alike
        state = {key: value.clone() for key, value in network.state_dict().items()}
        inherit_weights(supernet, network, dict(architecture))
        for key, value in network.state_dict().items():
            assert (value - state[key]).abs().max() <= 1e-5, key
    assert len({tuple(output[0].tolist()) for output in outputs}) == 40


def test_running_statistics_decide_the_evaluation(unsettle: Unsettle) -> None:
    """The test above would be blind if they had no influence."""
    space, _, _ = FORMS["nasbench201"]
    network = space.build_network(space.sample(torch.Generator().manual_seed(0)), 10).eval()
    images = torch.randn(2, 3, 16, 16)
    before = network(images)
    assert (unsettle(network)(images) - before).abs().max() > 1e-2


def small() -> tuple[MBConv, Architecture]:
    space = MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2), (24, 2, 2)], head_chs=32)
    return space, space.sample(torch.Generator().manual_seed(0))


# strides of nas_rl differ between height and width, and a network has one level alone; a scaled
# network's levels are those of its own resolution
LEVELS = {name: form for name, form in FORMS.items() if name != "nas_rl_strides"}
LEVELS["efficientnet_scaling"] = (scaled(1.0), 16, 4)


@pytest.mark.parametrize("form", LEVELS.values(), ids=LEVELS)
def test_feature_info_describes_the_tensors(form: Form) -> None:
    space, side, batch = form
    images = torch.randn(batch, 3, side, side)
    network = space.build_network(space.sample(torch.Generator().manual_seed(3)), 10).eval()
    modules = dict(network.named_modules())
    seen = {}
    for level in network.feature_info:
        modules[level["module"]].register_forward_hook(
            lambda _, __, y, name=level["module"]: seen.update({name: y})
        )
    with torch.no_grad():
        final, intermediates = network.forward_intermediates(images)
        assert torch.equal(final, network.forward_features(images))
    assert [level["reduction"] for level in network.feature_info] == sorted(
        {side // tensor.shape[-1] for tensor in intermediates}
    )
    for level, tensor in zip(network.feature_info, intermediates, strict=True):
        assert torch.equal(tensor, seen[level["module"]])
        assert tensor.shape[1:] == (level["num_chs"], *[side // level["reduction"]] * 2)


def test_intermediates_by_index() -> None:
    space, architecture = small()
    network = space.build_network(architecture, 10).eval()
    images = torch.randn(1, 3, 32, 32)
    every = network.forward_intermediates(images, intermediates_only=True)
    assert [t.shape[1] for t in every] == [8, 16, 24]
    calls = []
    network.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    early = network.forward_intermediates(
        images, indices=[0, 1], stop_early=True, intermediates_only=True
    )
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(early, every[:2], strict=True))
    (last,) = network.forward_intermediates(images, indices=1, intermediates_only=True)
    assert torch.equal(last, every[-1])
    with pytest.raises(ValueError, match="norm=True"):
        network.forward_intermediates(images, norm=True)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    space, architecture = small()
    network = space.build_network(architecture, 10)
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        network(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(network.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_dropout_acts_before_the_classifier_in_training_only() -> None:
    space, architecture = small()
    network = space.build_network(architecture, 10).train()
    network.drop_rate = 0.5
    features = torch.rand(8, 32, 2, 2) + 1.0
    dropped = network.forward_head(features, pre_logits=True)
    mean = features.mean((2, 3))
    zero = dropped == 0
    assert 0.3 < zero.float().mean() < 0.7
    assert torch.allclose(dropped[~zero], 2 * mean[~zero])
    assert torch.allclose(network.eval().forward_head(features, pre_logits=True), mean)


def test_resetting_the_classifier() -> None:
    space, architecture = small()
    network = space.build_network(architecture, 10).eval().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    network.reset_classifier(4)
    assert network(images).shape == (2, 4)
    assert not network.get_classifier().training
    network.reset_classifier(5, "catavgmax")
    assert network.head_hidden_size == 64
    assert network(images).shape == (2, 5)
    network.reset_classifier(0)
    assert torch.equal(
        network(images), network.forward_head(network.forward_features(images), pre_logits=True)
    )
    network.reset_classifier(0, "")
    assert network(images).shape == (2, 32, 4, 4)
