"""The MBConv space of ProxylessNAS (Cai et al. 2019, section 4.1): a chain of searchable blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from timm.layers import ConvNormAct, get_act_layer
from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates
from supernet.network import Block, Network
from supernet.ops.mbconv import check_act, depthwise_separable, inverted_residual
from supernet.space import Diagram, SearchSpace, Select

ZERO = "zero"


class MBConv(SearchSpace):
    """Kernel and expansion of every block, or its absence.

    A block may be absent (`zero`: only the identity remains) where its stride is 1 and its width
    does not change.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        stem_chs: width of the 3x3 stem.
        stem_stride: 2 in the paper; 1 for small images.
        first_chs: width of the first, fixed block (kernel 3, no expansion).
        stages: (width, layers, stride) each.
        kernels: candidate kernel sizes, odd.
        expansions: candidate expansion ratios.
        head_chs: width of the last 1x1 convolution.
        act: timm's name of the activation.
    """

    skip_options = frozenset({ZERO})

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 224,
        stem_chs: int = 32,
        stem_stride: int = 2,
        first_chs: int = 16,
        stages: Sequence[Sequence[int]] = (
            (24, 4, 2),
            (40, 4, 2),
            (80, 4, 2),
            (96, 4, 1),
            (192, 4, 2),
            (320, 1, 1),
        ),
        kernels: Sequence[int] = (3, 5, 7),
        expansions: Sequence[int] = (3, 6),
        head_chs: int = 1280,
        act: str = "relu6",
    ) -> None:
        if bad := [list(stage) for stage in stages if len(stage) != 3]:
            raise ValueError(f"a stage is [width, layers, stride]; got {bad[0]}")
        if bad_kernels := [kernel for kernel in kernels if kernel % 2 == 0]:
            raise ValueError(f"kernels must be odd, as 3, 5 and 7 are; got {bad_kernels[0]}")
        check_act(act)
        self.stem_chs, self.stem_stride, self.first_chs = stem_chs, stem_stride, first_chs
        self.stages = tuple((width, layers, stride) for width, layers, stride in stages)
        self.head_chs, self.act = head_chs, act
        self.shapes = {f"k{k}_e{e}": (k, e) for e in expansions for k in kernels}
        super().__init__(
            choices=tuple(self._choice(*position) for position in self._positions()),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "stem_chs": stem_chs,
                "stem_stride": stem_stride,
                "first_chs": first_chs,
                "stages": self.stages,
                "kernels": list(kernels),
                "expansions": list(expansions),
                "head_chs": head_chs,
                "act": act,
            },
        )

    def _positions(self) -> list[tuple[str, int, int, int]]:
        """(name, in_chs, out_chs, stride) of every searchable block."""
        positions, in_chs = [], self.first_chs
        for stage, (width, layers, stride) in enumerate(self.stages, start=1):
            for layer in range(layers):
                step = stride if layer == 0 else 1
                positions.append((f"stage{stage}_{layer}", in_chs, width, step))
                in_chs = width
        return positions

    def _choice(self, name: str, in_chs: int, out_chs: int, stride: int) -> Choice:
        may_vanish = stride == 1 and in_chs == out_chs
        return Choice(name, (*self.shapes, *([ZERO] if may_vanish else [])))

    def _candidates(self, choice: Choice, in_chs: int, out_chs: int, stride: int) -> Candidates:
        return {
            option: nn.Identity
            if option == ZERO
            else partial(
                inverted_residual,
                in_chs,
                out_chs,
                self.shapes[option][0],
                stride,
                self.shapes[option][1],
                self.act,
            )
            for option in choice.options
        }

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        conv = partial(ConvNormAct, act_layer=get_act_layer(self.act))
        first = depthwise_separable(self.stem_chs, self.first_chs, 3, self.act)
        blocks = [Block(first, self.first_chs, 1)]
        for name, in_chs, out_chs, stride in self._positions():
            choice = self.by_name[name]
            module = select(choice, self._candidates(choice, in_chs, out_chs, stride))
            blocks.append(Block(module, out_chs, stride))
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

    def scores(self, option_scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """First whether a block is there, by the probability of all its operations; then which.

        Six operations that are equally good have a sixth of the probability each: taken one by one
        they would all lose to `zero`. An operation's score is ln P(present) + ln(p / max p).
        """
        return {name: _two_stages(self.by_name[name], s) for name, s in option_scores.items()}

    def diagram(self, architecture: Architecture) -> Diagram:
        labels = ["image", f"stem {self.stem_chs}", f"k3 e1 {self.first_chs}"]
        labels += [
            "skip"
            if architecture[name] == ZERO
            else f"{architecture[name].replace('_', ' ')} {width}" + (" /2" if stride == 2 else "")
            for name, _, width, stride in self._positions()
        ]
        labels.append(f"head {self.head_chs}")
        edges = tuple((i, i + 1, "") for i in range(len(labels) - 1))
        return Diagram(tuple(labels), edges)


def _two_stages(choice: Choice, scores: Tensor) -> Tensor:
    """See `MBConv.scores`; log-probabilities up to a constant, shape (num_options,)."""
    if ZERO not in choice.options:
        return scores
    found = scores.clone()
    present = torch.arange(len(scores), device=scores.device) != choice.index(ZERO)
    found[present] += torch.logsumexp(scores[present], 0) - scores[present].max()
    return found
