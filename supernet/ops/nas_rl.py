"""Layers of the space of Zoph & Le (2017, section 4.1): one whose shape is settled, and one that
holds the weights of every shape it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, pad, relu


@dataclass(frozen=True)
class Shape:
    """What the choices say of one layer.

    Attributes:
        sources: the layers that it reads, numbered from 0; the image where there are none.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    filters: int
    sources: tuple[int, ...]

    @property
    def padding(self) -> tuple[int, int]:
        """Keeps the size at stride 1: kernels are odd."""
        return self.kernel[0] // 2, self.kernel[1] // 2


class Concat(nn.Module):
    """Side by side on the channels; small ones are filled with zeros to the size of the largest
    (section 3.3). A module, so that its latency is measured too."""

    def forward(self, *terms: Tensor) -> Tensor:
        height, width = (max(term.shape[side] for term in terms) for side in (2, 3))
        return torch.cat([_fill(term, height, width) for term in terms], dim=1)


def _fill(x: Tensor, height: int, width: int) -> Tensor:
    """With zeros below and to the right."""
    missing = width - x.shape[3], height - x.shape[2]
    return pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x


class Convolution(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_chs: int, shape: Shape) -> None:
        conv = nn.Conv2d(
            in_chs, shape.filters, shape.kernel, shape.stride, shape.padding, bias=False
        )
        super().__init__(conv, nn.BatchNorm2d(shape.filters), nn.ReLU())


class ElasticConvolution(nn.Module):
    """The same, for any shape: it takes its weights from the first filters of the largest
    convolution, from the centre of their kernels.

    Args:
        index: of the layer, which may read as many others.
        in_chans: channels of the image, for which it has weights of their own.
        kernel: the largest height and width.
        filters: the largest number, of this layer and of those it reads.
    """

    def __init__(self, index: int, in_chans: int, kernel: tuple[int, int], filters: int) -> None:
        super().__init__()
        self.filters = filters
        self.image = nn.Conv2d(in_chans, filters, kernel, bias=False)
        self.others = nn.ModuleList(
            nn.Conv2d(filters, filters, kernel, bias=False) for _ in range(index)
        )
        self.norm = nn.BatchNorm2d(filters)

    def weight(self, shape: Shape, in_chs: Sequence[int]) -> Tensor:
        """Of the convolution of one shape.

        Args:
            in_chs: channels of each layer that is read; those of the image where none is.
        """
        read = [self.others[source] for source in shape.sources] or [self.image]
        parts = []
        for conv, chs in zip(read, in_chs, strict=True):
            weight: Tensor = conv.weight  # type: ignore[assignment]
            top, left = ((weight.shape[2 + i] - shape.kernel[i]) // 2 for i in (0, 1))
            rows, columns = slice(top, top + shape.kernel[0]), slice(left, left + shape.kernel[1])
            parts.append(weight[: shape.filters, :chs, rows, columns])
        return torch.cat(parts, dim=1)

    def state_of(self, shape: Shape, in_chs: Sequence[int]) -> dict[str, Tensor]:
        """The state of a `Convolution` of one shape."""
        norm = {
            f"1.{name}": value[: shape.filters] if value.ndim else value
            for name, value in self.norm.state_dict().items()
        }
        return {"0.weight": self.weight(shape, in_chs).detach(), **norm}

    def forward(self, x: Tensor, shape: Shape, in_chs: Sequence[int]) -> Tensor:
        """(N, sum of in_chs, H, W) -> (N, shape.filters, ceil(H / stride), ceil(W / stride))."""
        norm, few = self.norm, shape.filters
        y = conv2d(x, self.weight(shape, in_chs), None, shape.stride, shape.padding)
        mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None and var is not None and count is not None
        if norm.training:
            count.add_(1)
        assert norm.momentum is not None
        return relu(
            batch_norm(
                y, mean[:few], var[:few], norm.weight[:few], norm.bias[:few], norm.training,
                norm.momentum, norm.eps,
            )
        )  # fmt: skip
