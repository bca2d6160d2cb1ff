"""The form of the operations, as the literature has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d

from supernet.ops.blocks import BUILDERS

# In the order in which they run, a convolution as its kernel and, where that is not 1, dilation;
# * is a depthwise one. Of stride 1; NASNet (Zoph et al. 2018), figure 8 and the official code.
FORMS: Mapping[str, str] = {
    "identity": "",
    "skip_connect": "",
    "conv_1x1": "relu 1x1 norm",
    "conv_3x3": "relu 3x3 norm",
    "conv_1x3_3x1": "relu 1x3 3x1 norm",
    "conv_1x7_7x1": "relu 1x7 7x1 norm",
    "dil_conv_3x3": "relu 3x3/2 norm",
    "dil_sep_conv_3x3": "relu *3x3/2 1x1 norm",
    "sep_conv_3x3": "relu *3x3 1x1 norm relu *3x3 1x1 norm",
    "sep_conv_5x5": "relu *5x5 1x1 norm relu *5x5 1x1 norm",
    "sep_conv_7x7": "relu *7x7 1x1 norm relu *7x7 1x1 norm",
}
POOLS = {"avg_pool_3x3": 3, "max_pool_3x3": 3, "max_pool_5x5": 5, "max_pool_7x7": 7}


def describe(module: Any) -> str:
    if isinstance(module, nn.Conv2d):
        star = "*" if module.groups == module.in_channels > 1 else ""
        dilation = "/2" if module.dilation == (2, 2) else ""
        return star + "{}x{}".format(*module.kernel_size) + dilation
    return {nn.ReLU: "relu", nn.BatchNorm2d: "norm", nn.Identity: ""}[type(module)]


@pytest.mark.parametrize("name", FORMS)
def test_layers_run_in_the_order_of_the_literature(name: str) -> None:
    operation, ran = BUILDERS[name](4, 1), []
    for module in operation.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda own, *_: ran.append(describe(own)))
    assert operation(torch.randn(2, 4, 7, 7)).shape == (2, 4, 7, 7)
    assert " ".join(ran) == FORMS[name]
    assert BUILDERS[name](4, 2)(torch.randn(2, 4, 8, 8)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", POOLS)
def test_pools_leave_their_padding_out(name: str, stride: int) -> None:
    side = POOLS[name]
    x, half = torch.randn(2, 4, 8, 8), side // 2
    if name.startswith("avg"):
        total, number = (avg_pool2d(y, side, stride, half) for y in (x, torch.ones_like(x)))
        expected = total / number
    else:  # all are negative: a zero of the padding would be the most
        x = -x.abs()
        expected = max_pool2d(nn.functional.pad(x, [half] * 4, value=-9.0), side, stride)
    torch.testing.assert_close(BUILDERS[name](4, stride)(x), expected)


def test_these_are_all() -> None:
    assert {*FORMS, *POOLS} == {*BUILDERS}
