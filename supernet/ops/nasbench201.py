"""Operations of NAS-Bench-201 (Dong & Yang 2020, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from supernet.joint import Common, Factors, Joint, Nothing, joint_norm
from supernet.mixed_ops.base import Parts


class Zero(Nothing):
    """`none`: the edge carries nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape)


class ReLUConvBN(Parts, Joint):
    """ReLU, convolution, batch norm; size-preserving at stride 1."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.out_chs, self.kernel_size = out_chs, kernel_size
        self.relu = nn.ReLU()
        self.conv = nn.Sequential(
            nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_chs, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(x))

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        convs, norms = zip(*(module.conv for module in modules), strict=True)
        weight = torch.cat([conv.weight for conv in convs])
        x = common.rectified()
        y = conv2d(x, weight, None, convs[0].stride, convs[0].padding)
        return joint_norm(y, norms, factors)


class ResidualReduction(nn.Module):
    """The block between stages: two 3x3 convolutions, the first of stride 2, and a shortcut."""

    def __init__(self, in_chs: int, out_chs: int, affine: bool = True) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(in_chs, out_chs, 3, stride=2, affine=affine)
        self.conv_b = ReLUConvBN(out_chs, out_chs, 3, affine=affine)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, stride=2), nn.Conv2d(in_chs, out_chs, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv_b(self.conv_a(x))
