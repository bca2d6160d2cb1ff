"""Operations of ENAS's macro space (Pham et al. 2018, section 2.3 and the official code's
`general_child.py`, in the form of its search)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from supernet.mixed_ops.base import Parts
from supernet.ops.darts import shifted


def conv_branch(chs: int, kernel: int, separable: bool) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU; then a convolution, or a depthwise and a 1x1 one, batch
    norm, ReLU."""
    padding = kernel // 2
    if separable:
        depthwise = nn.Conv2d(chs, chs, kernel, padding=padding, groups=chs, bias=False)
        layers = [depthwise, nn.Conv2d(chs, chs, 1, bias=False)]
    else:
        layers = [nn.Conv2d(chs, chs, kernel, padding=padding, bias=False)]
    return nn.Sequential(*_pointwise(chs), *layers, nn.BatchNorm2d(chs), nn.ReLU())


def pool_branch(chs: int, kind: str) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU; then a 3x3 maximum or average of stride 1."""
    pool = (
        nn.MaxPool2d(3, stride=1, padding=1)
        if kind == "max"
        else nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    )
    return nn.Sequential(*_pointwise(chs), pool)


def _pointwise(chs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(chs, chs, 1, bias=False), nn.BatchNorm2d(chs), nn.ReLU()


class Add(nn.Module):
    """One more term of a sum. A module, so that its latency is measured too."""

    def forward(self, total: Tensor, term: Tensor) -> Tensor:
        return total + term


class Join(Parts):
    """A skip connection: hands an earlier state on. What it costs is to add it."""

    def __init__(self) -> None:
        super().__init__()
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        return x


class FactorizedReduction(nn.Module):
    """Two 1x1 convolutions that read every other pixel, the second one pixel further down and
    right, side by side; batch norm. (That of DARTS begins with a ReLU.)"""

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_chs, out_chs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_chs, out_chs - out_chs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.even(x), self.odd(shifted(x))], dim=1))
