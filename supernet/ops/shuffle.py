"""Choice blocks of single path one-shot (Guo et al. 2020, figure 5), units of ShuffleNetV2."""

from __future__ import annotations

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the others go through convolutions (Ma et al. 2018, figure 3c);
    where width or resolution change, all go both ways, through a short branch and a long one (3d).

    Channels of even index are the half that passes. That shuffles what the unit before put side by
    side.

    Args:
        in_chs, out_chs: widths; equal and even at stride 1, else the output has more.
        kernel_size: of the depthwise convolutions.
        stride: of the first depthwise convolution, and of the short branch's.
        layout: of the long branch, "d" for a depthwise and "p" for a pointwise convolution.
        affine: whether batch norms have scale and shift.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int,
        layout: str = "pdp",
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.splits = stride == 1 and in_chs == out_chs
        chs = in_chs // 2 if self.splits else in_chs
        assert chs < out_chs and layout.endswith("p"), (in_chs, out_chs, layout)
        short = [_depthwise(chs, kernel_size, stride, affine), _pointwise(chs, chs, affine)]
        self.short = nn.Identity() if self.splits else nn.Sequential(*short)
        widths = [chs, *[out_chs // 2] * (layout.count("p") - 1), out_chs - chs]
        layers: list[nn.Module] = []
        for kind in layout:
            if kind == "d":
                layers.append(_depthwise(widths[0], kernel_size, stride, affine))
                stride = 1
            else:
                layers.append(_pointwise(widths[0], widths[1], affine))
                widths = widths[1:]
        self.long = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chs, H, W) -> (N, out_chs, H / stride, W / stride)."""
        ways = (x[:, ::2], x[:, 1::2]) if self.splits else (x, x)
        return torch.cat([self.short(ways[0]), self.long(ways[1])], dim=1)


def _depthwise(chs: int, kernel_size: int, stride: int, affine: bool) -> nn.Module:
    """No activation follows, as in ShuffleNetV2."""
    return ConvNormAct(
        chs, chs, kernel_size, stride=stride, groups=chs, apply_act=False,
        norm_kwargs={"affine": affine},
    )  # fmt: skip


def _pointwise(in_chs: int, out_chs: int, affine: bool) -> nn.Module:
    return ConvNormAct(in_chs, out_chs, 1, norm_kwargs={"affine": affine})
