"""Operations of the spaces whose cells consist of blocks: NASNet, PNAS, AmoebaNet and ENAS.

As in the official code, convolutions come after a ReLU and before a batch norm, separable ones
twice in a row, and pools have no batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from supernet.ops.darts import DilatedConv, FactorizedReduction, SeparableConv
from supernet.ops.nasbench201 import ReLUConvBN

Builder = Callable[[int, int], nn.Module]  # from width and stride


def _identity(width: int, stride: int) -> nn.Module:
    """Of stride 2 a 1x1 convolution, as in the official code of NASNet, PNAS and AmoebaNet."""
    return nn.Identity() if stride == 1 else ReLUConvBN(width, width, 1, stride)


def _skip(width: int, stride: int) -> nn.Module:
    """Of stride 2 a factorized reduction, as in the official code of ENAS."""
    return nn.Identity() if stride == 1 else FactorizedReduction(width, width, affine=True)


def _conv(kernel: int, width: int, stride: int) -> nn.Module:
    return ReLUConvBN(width, width, kernel, stride)


def _row_and_column(kernel: int, width: int, stride: int) -> nn.Module:
    """1 x kernel, then kernel x 1, each with its direction of the stride."""
    half = kernel // 2
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, width, (1, kernel), (1, stride), (0, half), bias=False),
        nn.Conv2d(width, width, (kernel, 1), (stride, 1), (half, 0), bias=False),
        nn.BatchNorm2d(width),
    )


def _dilated(width: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(width, width, 3, stride, padding=2, dilation=2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(width))


def _dilated_separable(width: int, stride: int) -> nn.Module:
    return DilatedConv(width, 3, stride, affine=True)


def _separable(kernel: int, width: int, stride: int) -> nn.Module:
    return SeparableConv(width, kernel, stride, affine=True)


def _average(width: int, stride: int) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


def _maximum(kernel: int, width: int, stride: int) -> nn.Module:
    return nn.MaxPool2d(kernel, stride, padding=kernel // 2)


BUILDERS: Mapping[str, Builder] = {
    "identity": _identity,
    "skip_connect": _skip,
    "conv_1x1": partial(_conv, 1),
    "conv_3x3": partial(_conv, 3),
    "conv_1x3_3x1": partial(_row_and_column, 3),
    "conv_1x7_7x1": partial(_row_and_column, 7),
    "dil_conv_3x3": _dilated,
    "dil_sep_conv_3x3": _dilated_separable,
    "sep_conv_3x3": partial(_separable, 3),
    "sep_conv_5x5": partial(_separable, 5),
    "sep_conv_7x7": partial(_separable, 7),
    "avg_pool_3x3": _average,
    "max_pool_3x3": partial(_maximum, 3),
    "max_pool_5x5": partial(_maximum, 5),
    "max_pool_7x7": partial(_maximum, 7),
}
