"""The space of single path one-shot (Guo et al. 2020, section 3.4): a chain of choice blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from timm.layers import ConvNormAct

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates
from supernet.network import Block, Network
from supernet.ops.shuffle import ShuffleUnit
from supernet.space import Diagram, SearchSpace, Select

UNITS = {  # option: kernel and layout, in the order of the official code
    "shuffle_3x3": (3, "pdp"),
    "shuffle_5x5": (5, "pdp"),
    "shuffle_7x7": (7, "pdp"),
    "xception_3x3": (3, "dpdpdp"),
}


class Spos(SearchSpace):
    """Twenty blocks, each one of four units of ShuffleNetV2: 4^20 = 1.1e12 architectures.

    Numbers are those of the paper's table 1 and the official code. As there, batch norms have no
    scale and shift while searching. Other than there, the classifier has a bias, and the numbers of
    channels are fixed.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        stem_chs: width of the 3x3 stem.
        stem_stride: 2 in the paper; 1 for small images.
        stages: (width, layers, stride) each; widths are even and grow from stage to stage.
        head_chs: width of the last 1x1 convolution.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 224,
        stem_chs: int = 16,
        stem_stride: int = 2,
        stages: Sequence[Sequence[int]] = ((64, 4, 2), (160, 4, 2), (320, 8, 2), (640, 4, 2)),
        head_chs: int = 1024,
    ) -> None:
        if bad := [list(stage) for stage in stages if len(stage) != 3]:
            raise ValueError(f"a stage is [width, layers, stride]; got {bad[0]}")
        before = stem_chs
        for width, _, _ in stages:
            if width % 2 or width <= before:
                raise ValueError(
                    "widths of stages must be even and grow, from stem_chs on: a unit adds to the "
                    f"channels that it passes on; got {width} after {before}"
                )
            before = width
        self.stem_chs, self.stem_stride, self.head_chs = stem_chs, stem_stride, head_chs
        self.stages = tuple((width, layers, stride) for width, layers, stride in stages)
        super().__init__(
            choices=tuple(Choice(name, tuple(UNITS)) for name, *_ in self._positions()),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "stem_chs": stem_chs,
                "stem_stride": stem_stride,
                "stages": self.stages,
                "head_chs": head_chs,
            },
        )

    def _positions(self) -> list[tuple[str, int, int, int]]:
        """(name, in_chs, out_chs, stride) of every block."""
        positions, in_chs = [], self.stem_chs
        for stage, (width, layers, stride) in enumerate(self.stages, start=1):
            for layer in range(layers):
                step = stride if layer == 0 else 1
                positions.append((f"stage{stage}_{layer}", in_chs, width, step))
                in_chs = width
        return positions

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        affine = not search
        conv = partial(ConvNormAct, norm_kwargs={"affine": affine})
        blocks = []
        for name, in_chs, out_chs, stride in self._positions():
            candidates: Candidates = {
                option: partial(ShuffleUnit, in_chs, out_chs, kernel, stride, layout, affine)
                for option, (kernel, layout) in UNITS.items()
            }
            blocks.append(Block(select(self.by_name[name], candidates), out_chs, stride))
        return Network(
            stem=conv(self.in_chans, self.stem_chs, 3, stride=self.stem_stride),
            stem_stride=self.stem_stride,
            blocks=blocks,
            final=conv(self.stages[-1][0], self.head_chs, 1),
            num_features=self.head_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
        )

    def diagram(self, architecture: Architecture) -> Diagram:
        labels = ["image", f"stem {self.stem_chs}"]
        labels += [
            f"{architecture[name].replace('_', ' ')} {width}" + (" /2" if stride == 2 else "")
            for name, _, width, stride in self._positions()
        ]
        labels.append(f"head {self.head_chs}")
        return Diagram(tuple(labels), tuple((i, i + 1, "") for i in range(len(labels) - 1)))
