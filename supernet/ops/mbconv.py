"""MBConv blocks, as timm builds them (the one place that imports timm's private block module)."""

from __future__ import annotations

from timm.layers import get_act_layer
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import nn


def inverted_residual(
    in_chs: int, out_chs: int, kernel_size: int, stride: int, expansion: float, act: str
) -> nn.Module:
    """1x1 expansion, depthwise convolution, 1x1 projection; residual where shapes allow."""
    return InvertedResidual(
        in_chs,
        out_chs,
        dw_kernel_size=kernel_size,
        stride=stride,
        exp_ratio=expansion,
        act_layer=get_act_layer(act),
    )


def depthwise_separable(in_chs: int, out_chs: int, kernel_size: int, act: str) -> nn.Module:
    """MBConv without expansion: depthwise convolution, 1x1 projection."""
    return DepthwiseSeparableConv(
        in_chs, out_chs, dw_kernel_size=kernel_size, noskip=True, act_layer=get_act_layer(act)
    )
