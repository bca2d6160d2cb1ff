"""Operations of DARTS (Liu et al. 2019, section 3.1 and the official code's operations)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, relu

from supernet.joint import Common, Factors, Joint, Nothing, joint_norm, norm_once, recipe_once
from supernet.mixed_ops.base import Parts


class Zero(Parts, Nothing):
    """`none`: the edge carries nothing. A derived cell leaves it out, hence no part is measured."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Pool(Joint):
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

    @classmethod
    def once(cls, modules: Sequence[Any], common: Common) -> Tensor | None:
        """All pools are one, and in training their norms see the same batch."""
        pool, norm = modules[0].pool, modules[0].norm
        if isinstance(norm, nn.BatchNorm2d) and not norm.training:
            return None  # of statistics of their own
        x = common.once(recipe_once(pool), pool)
        return norm_once(x, [m.norm for m in modules]) if isinstance(norm, nn.BatchNorm2d) else x

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        pool = modules[0].pool
        x = common.once(recipe_once(pool), pool)
        return joint_norm(torch.cat([x] * len(modules), dim=1), [m.norm for m in modules], factors)


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


def _side_by_side(x: Tensor, modules: Sequence[DepthwiseSeparable], factors: Factors) -> Tensor:
    """All of `modules` after their ReLU, each on its part of x's channels."""
    first = modules[0].depthwise
    weight = torch.cat([m.depthwise.weight for m in modules])
    y = conv2d(x, weight, None, first.stride, first.padding, groups=len(weight))
    return _finish(y, modules, factors)


def _finish(y: Tensor, modules: Sequence[DepthwiseSeparable], factors: Factors) -> Tensor:
    """What follows the depthwise convolutions."""
    y = conv2d(y, torch.cat([m.pointwise.weight for m in modules]), groups=len(modules))
    return joint_norm(y, [m.norm for m in modules], factors)


def _parities(x: Tensor) -> Tensor:
    """Every other pixel, four times: (N, C, H, W) -> (4 N, C, ceil(H / 2), ceil(W / 2)).

    Channels last, in which depthwise convolutions are fastest on a CPU.
    """
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        x = pad(x, (0, width % 2, 0, height % 2))
    n, chs, rows, columns = len(x), x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    x = x.permute(0, 2, 3, 1).reshape(n, rows, 2, columns, 2, chs)
    x = x.permute(2, 4, 0, 1, 3, 5).reshape(4 * n, rows, columns, chs)
    return x.permute(0, 3, 1, 2)


def _whole(y: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_parities`."""
    n, (chs, rows, columns) = len(y) // 4, y.shape[1:]
    y = y.permute(0, 2, 3, 1).reshape(2, 2, n, rows, columns, chs).permute(2, 3, 0, 4, 1, 5)
    y = y.reshape(n, 2 * rows, 2 * columns, chs).permute(0, 3, 1, 2)
    return y[:, :, :height, :width]


class DilatedConv(DepthwiseSeparable, Joint):
    """`dil_conv`: once, with dilation 2."""

    def __init__(self, chs: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__(chs, chs, kernel, stride, dilation=2, affine=affine)

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        """As a convolution without dilation on every other pixel: a dilated one has no fast
        gradient on a CPU. An output reads pixels of its own parity alone, in both directions, and
        with stride 2 only the even ones are left.
        """
        x, copies = common.rectified(len(modules)), len(modules)
        weight = torch.cat([m.depthwise.weight for m in modules])
        conv = partial(conv2d, weight=weight, padding=weight.shape[-1] // 2, groups=len(weight))
        if modules[0].depthwise.stride == (2, 2):
            y = conv(x[:, :, ::2, ::2])
        else:
            parts = common.once(f"parities x{copies}", lambda _: _parities(x))
            y = _whole(conv(parts), *x.shape[-2:])
        return _finish(y, modules, factors)


class SeparableConv(Joint):
    """`sep_conv`: twice, the first with the stride."""

    def __init__(self, chs: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.first = DepthwiseSeparable(chs, chs, kernel, stride, dilation=1, affine=affine)
        self.second = DepthwiseSeparable(chs, chs, kernel, 1, dilation=1, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        plain = [None] * len(modules)
        y = _side_by_side(common.rectified(len(modules)), [m.first for m in modules], plain)
        return _side_by_side(relu(y, inplace=True), [m.second for m in modules], factors)


class FactorizedReduction(Joint):
    """A skip of stride 2: ReLU, two 1x1 convolutions that read every other pixel, the second one
    pixel further down and right, side by side; batch norm, unless it is left to what follows."""

    def __init__(self, in_chs: int, out_chs: int, affine: bool, norm: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(in_chs, out_chs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_chs, out_chs - out_chs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_chs, affine=affine) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(shifted(x))], dim=1))

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        x = common.rectified()
        even = conv2d(x, torch.cat([m.even.weight for m in modules]), stride=2)
        odd = conv2d(shifted(x), torch.cat([m.odd.weight for m in modules]), stride=2)
        halves = (half.chunk(len(modules), dim=1) for half in (even, odd))
        y = torch.cat([part for pair in zip(*halves, strict=True) for part in pair], dim=1)
        return joint_norm(y, [m.norm for m in modules], factors)


def shifted(x: Tensor) -> Tensor:
    """From one pixel further down and right; a side of odd length is continued by zeros."""
    height, width = x.shape[-2:]
    x = x if height % 2 == width % 2 == 0 else pad(x, (0, width % 2, 0, height % 2))
    return x[:, :, 1:, 1:]


class AuxiliaryHead(nn.Sequential):
    """The second classifier of a retraining (the official code's, for features of side 7 or 8).

    Raises:
        ValueError: its features are of side 1.
    """

    def __init__(self, in_chs: int, side: int, num_classes: int) -> None:
        if side < 2:
            raise ValueError(
                f"the auxiliary classifier needs features of side 2 or more, not of {side}: set "
                "recipe.aux_weight=0, or take larger images (data.img_size=5 or more)"
            )
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
