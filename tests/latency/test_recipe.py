from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from timm.layers import SEModule
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_blocks import SqueezeExcite as InnerSqueezeExcite
from torch import Tensor, nn

from latency.recipe import recipe


class Plain(nn.Module):
    """A user's own layer, without `extra_repr`."""

    def __init__(self, size: int = 3, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.size, self.act = size, act


class Own(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(shape))


def block(**settings: object) -> nn.Module:
    return InvertedResidual(16, **{"out_chs": 16, **settings})


def test_a_layer_shows_what_differs_from_its_defaults() -> None:
    conv = nn.Conv2d(16, 96, 3, padding=1, groups=16, bias=False)
    assert recipe(conv) == "Conv2d(16,96,3x3,groups=16,padding=1x1,bias=None)"
    assert recipe(nn.Identity()) == "Identity"
    stack = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))
    assert recipe(stack) == "Sequential[ReLU,BatchNorm2d(4)]"


def test_equal_modules_have_equal_recipes_whatever_their_weights() -> None:
    a, b = block(dw_kernel_size=5), block(dw_kernel_size=5)
    b.train(not a.training)
    assert recipe(a) == recipe(b)


def test_every_hyperparameter_counts() -> None:
    variants = [
        block(),
        block(dw_kernel_size=5),
        block(stride=2),
        block(out_chs=24),
        block(exp_ratio=3.0),
        block(exp_ratio=6.0),
        block(group_size=2),
        block(dilation=2),
        block(noskip=True),
        block(act_layer=nn.SiLU),
        block(act_layer=nn.ReLU6),
        block(se_layer=SEModule),
        block(se_layer=functools.partial(SEModule, rd_ratio=1.0)),
        block(se_layer=InnerSqueezeExcite),
        block(norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3)),
        DepthwiseSeparableConv(16, 16),
        DepthwiseSeparableConv(16, 16, noskip=True),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.Conv2d(16, 16, (3, 1)),
        nn.Conv2d(16, 16, 3, padding_mode="reflect"),
        nn.AvgPool2d(3),
        nn.AvgPool2d(3, count_include_pad=False),
        nn.AvgPool2d(3, ceil_mode=True),
        nn.BatchNorm2d(16),
        nn.BatchNorm2d(16, affine=False),
        Plain(),
        Plain(5),
        Plain(act=torch.tanh),
        Plain(act=nn.functional.gelu),
        Plain(act=functools.partial(nn.functional.leaky_relu, negative_slope=0.2)),
        Own(3, 3),
        Own(5, 5),
        nn.Sequential(nn.ReLU(), nn.Tanh()),
        nn.Sequential(nn.Tanh(), nn.ReLU()),
    ]
    for a, b in itertools.combinations(variants, 2):
        assert recipe(a) != recipe(b), (a, b)


def test_classes_of_one_name_differ() -> None:
    def make(module: str) -> nn.Module:
        cls = type("Op", (nn.Module,), {"__module__": module})
        instance = cls()
        assert isinstance(instance, nn.Module)
        return instance

    assert recipe(make("first")) != recipe(make("second"))


@pytest.mark.parametrize("value", [(1, 2), [3], {"a": 1}, torch.float16, nn.ReLU, object()])
def test_any_attribute_is_written(value: object) -> None:
    module = nn.Module()
    module.value = value
    assert "value=" not in recipe(module)  # not an argument of nn.Module itself
    own = Plain()
    own.value = value
    assert "value=" in recipe(own)
