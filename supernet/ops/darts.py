"""Operations of DARTS (Liu et al. 2019, section 3.1 and the official code's operations)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from supernet.mixed_ops.base import Parts


class Zero(Parts):
    """`none`: the edge carries nothing. A derived cell leaves it out, hence no part is measured."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Pool(nn.Module):
    """3x3 maximum or average, then a batch norm without scale and shift where `norm`."""

    def __init__(self, chs: int, kind: str, stride: int, norm: bool) -> None:
        super().__init__()
        self.pool = (
            nn.MaxPool2d(3, stride, padding=1)
            if kind == "max"
            else nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        )
        self.norm = nn.BatchNorm2d(chs, affine=False) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(x))


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise convolution, 1x1 convolution, batch norm."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel: int, stride: int, dilation: int, affine: bool
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(
            in_chs, in_chs, kernel, stride, padding, dilation, groups=in_chs, bias=False
        )
        self.pointwise = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_chs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(self.relu(x))))


class DilatedConv(DepthwiseSeparable):
    """`dil_conv`: once, with dilation 2."""

    def __init__(self, chs: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(chs, chs, kernel, stride, dilation=2, affine=affine)


class SeparableConv(nn.Module):
    """`sep_conv`: twice, the first with the stride."""

    def __init__(self, chs: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.first = DepthwiseSeparable(chs, chs, kernel, stride, dilation=1, affine=affine)
        self.second = DepthwiseSeparable(chs, chs, kernel, 1, dilation=1, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class FactorizedReduction(nn.Module):
    """A skip of stride 2: ReLU, two 1x1 convolutions that read every other pixel, the second one
    pixel further down and right, side by side; batch norm."""

    def __init__(self, in_chs: int, out_chs: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(in_chs, out_chs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_chs, out_chs - out_chs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_chs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduce(self.relu(x)))

    def reduce(self, x: Tensor) -> Tensor:
        """Before the norm; a side of odd length is continued by zeros."""
        height, width = x.shape[-2:]
        shifted = x if height % 2 == width % 2 == 0 else pad(x, (0, width % 2, 0, height % 2))
        return torch.cat([self.even(x), self.odd(shifted[:, :, 1:, 1:])], dim=1)


class AuxiliaryHead(nn.Sequential):
    """The second classifier of a retraining (the official code's, for features of side 7 or 8)."""

    def __init__(self, in_chs: int, side: int, num_classes: int) -> None:
        kernel = min(5, side - 1)
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(kernel, stride=max(1, side - kernel), count_include_pad=False),  # 2x2
            nn.Conv2d(in_chs, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )
