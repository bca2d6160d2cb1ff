"""PC-DARTS (Xu et al. 2020, section 3.2): a share of the channels goes through the candidates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import channel_shuffle

from supernet.choice import Choice
from supernet.mixed_ops.base import Candidates, MixedOp, Scalable, Weights
from supernet.mixed_ops.softmax import Softmax


class PartialOp(MixedOp):
    """The first C / K channels are mixed, the others pass; both are shuffled together, so that
    other channels are first at the next position (equation 2).

    Args:
        candidates: of the position's full width.
        share: K.
    """

    plain = False

    def __init__(self, choice: Choice, candidates: Scalable, share: int) -> None:
        super().__init__(choice, candidates.at(candidates.width // share))
        self.share, self.few = share, candidates.width // share
        stride = candidates.stride
        # a candidate of stride 2 rounds odd sizes up
        pool = nn.MaxPool2d(stride, stride, ceil_mode=True)
        self.bypass = pool if stride > 1 else nn.Identity()

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, C, H, W) -> (N, C, H / stride, W / stride)."""
        mixed = super().forward(x[:, : self.few], weights)
        if self.share == 1:
            return mixed
        whole = torch.cat([mixed, self.bypass(x[:, self.few :])], dim=1)
        return channel_shuffle(whole, self.share)


class PartialChannels(Softmax):
    """The mixture of DARTS on 1 / K of the channels: less memory and time a step, and less of an
    advantage for operations without weights. Edge normalisation (section 3.3) is not part of it.

    Candidates are narrower here than in a derived network, which therefore inherits no weights; in
    the search it is judged in this partial form.

    Args:
        share: K; 4 in the paper. It has to divide the width of every position.
    """

    inheritable = False

    def __init__(self, share: int = 4) -> None:
        if share < 1:
            raise ValueError(f"mixed_op.share must be 1 or more; got {share}")
        self.share = share

    def build(self, choice: Choice, candidates: Candidates) -> MixedOp:
        if not isinstance(candidates, Scalable):
            raise ValueError(
                "mixed_op=partial_channels needs positions that keep their number of channels, as "
                f"in space=nasbench201; choice {choice.name!r} is none. Other mixed ops fit every "
                "space: softmax, beta_softmax, sigmoid, gumbel, binary_gate, one_shot"
            )
        if candidates.width % self.share:
            raise ValueError(
                f"mixed_op.share={self.share} does not divide the {candidates.width} channels of "
                f"choice {choice.name!r}; take a divisor of every width of the space"
            )
        return PartialOp(choice, candidates, self.share)
