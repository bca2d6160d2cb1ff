"""MBConv blocks, as timm builds them (the one place that imports timm's private block module)."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
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


def mnas_layer(
    op: str, kernel_size: int, se_ratio: float, in_chs: int, out_chs: int, stride: int
) -> nn.Module:
    """A layer of MnasNet without its skip path (Tan et al. 2019, section 4.1 and figure 7).

    As in the official code, squeeze-and-excitation follows the depthwise convolution, and its ratio
    is to the layer's input; there it is not said how a regular convolution has it: it comes last.

    Args:
        op: "conv", "sepconv", or "mbconv" and its expansion.
        se_ratio: 0 for none.
    """
    squeeze: Any = partial(SqueezeExcite, rd_channels=max(1, round(in_chs * se_ratio)))
    se_layer = squeeze if se_ratio else None
    if op == "conv":
        conv = ConvBnAct(in_chs, out_chs, kernel_size, stride)
        return nn.Sequential(conv, squeeze(out_chs)) if se_ratio else conv
    if op == "sepconv":
        return DepthwiseSeparableConv(
            in_chs, out_chs, kernel_size, stride, noskip=True, se_layer=se_layer
        )
    expansion = float(op.removeprefix("mbconv"))
    return InvertedResidual(
        in_chs, out_chs, kernel_size, stride, noskip=True, exp_ratio=expansion, se_layer=se_layer
    )
