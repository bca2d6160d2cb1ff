"""MBConv blocks, as timm builds them (the one place that imports timm's private modules)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
from timm.models._efficientnet_builder import (
    EfficientNetBuilder,
    decode_arch_def,
    round_channels,
)
from torch import nn

NEVER = 2**16  # an output stride beyond which timm dilates instead of striding


def check_act(act: str) -> None:
    """Make sure that timm has an activation of this name.

    Raises:
        ValueError: it has none.
    """
    try:
        get_act_layer(act)
    except KeyError:
        raise ValueError(
            f"{act=} is no activation of timm; for example relu, relu6, hard_swish, swish"
        ) from None


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


def scaled_chs(chs: int, width: float, divisor: int) -> int:
    """`chs * width`, rounded to a multiple of `divisor` that is at least 90% of it."""
    return int(round_channels(chs, width, divisor))


def decode_stage(definition: str, depth: float = 1.0) -> Sequence[dict[str, Any]]:
    """timm's arguments of the blocks of a stage, in number `depth` times as many, rounded up.

    Args:
        definition: timm's block string, such as ir_r2_k3_s2_e6_c24_se0.25.

    Raises:
        ValueError: it is none.
    """
    try:
        (blocks,) = decode_arch_def([[definition]], depth)
        return [block for block in blocks if block["out_chs"] and block["stride"]]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"stage {definition!r} is no block string of timm, such as ir_r2_k3_s2_e6_c24_se0.25: "
            "kind, repeats, kernel, stride, expansion, channels, squeeze-and-excitation"
        ) from error


def scaled_stage(
    definition: str, in_chs: int, depth: float, width: float, divisor: int, act: str
) -> nn.Module:
    """A stage of EfficientNet.

    Args:
        definition: timm's block string.
        in_chs: of what it reads, scaled already.
        depth: coefficient of the number of blocks.
        width: coefficient of the channels.
    """
    builder = EfficientNetBuilder(
        output_stride=NEVER,
        round_chs_fn=partial(round_channels, multiplier=width, divisor=divisor),
        act_layer=get_act_layer(act),
        norm_layer=nn.BatchNorm2d,
        se_layer=SqueezeExcite,
    )
    (stage,) = builder(in_chs, [decode_stage(definition, depth)])
    return stage


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
