"""PC-DARTS (Xu et al. 2020): a share of the channels goes through the candidates (section 3.2), and
the inputs of a node are weighed against each other (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import channel_shuffle

from supernet.choice import Choice
from supernet.mixed_ops.base import Candidates, MixedOp, Scalable, Weights
from supernet.mixed_ops.softmax import Softmax


class PartialOp(MixedOp):
    """The first C / K channels are mixed, the others pass; both are shuffled together, so that
    other channels are first at the next position (equation 2). All are multiplied by what `weights`
    has for this input of the node that they go into (equation 4); without it, by one.

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
        whole = super().forward(x[:, : self.few], weights)
        if self.share > 1:
            whole = torch.cat([whole, self.bypass(x[:, self.few :])], dim=1)
            whole = channel_shuffle(whole, self.share)
        node = self.choice.into
        if node is None or (path := weights.get(node.name)) is None or path.values is None:
            return whole
        return path.values[node.index(self.choice.name)].to(whole.dtype) * whole


class PartialChannels(Softmax):
    """The mixture of DARTS on 1 / K of the channels: less memory and time a step, and less of an
    advantage for operations without weights.

    Few channels make the choice of edges unstable. Edge normalisation holds against that: node j is
    sum_i softmax(beta_j)_i f_ij(x_i) (equation 4), with betas that are trained as the logits are.
    In derivation the strength of an edge is its share of the node times that of its operation,
    which matters where a space leaves edges out; costs do not depend on it.

    Candidates are narrower here than in a derived network, which therefore inherits no weights; in
    the search it is judged in this partial form.

    Args:
        share: K; 4 in the paper. It has to divide the width of every position.
        edge_norm: whether there are betas; without them node j is sum_i f_ij(x_i).
    """

    inheritable = False

    def __init__(self, share: int = 4, edge_norm: bool = True) -> None:
        if share < 1:
            raise ValueError(f"mixed_op.share must be 1 or more; got {share}")
        self.share, self.edge_norm = share, edge_norm

    def nodes(self, choices: Sequence[Choice]) -> tuple[Choice, ...]:
        found = dict.fromkeys(choice.into for choice in choices if choice.into is not None)
        return tuple(found) if self.edge_norm else ()

    def build(self, choice: Choice, candidates: Candidates) -> MixedOp:
        if not isinstance(candidates, Scalable):
            raise ValueError(
                "mixed_op=partial_channels needs positions that keep their number of channels, as "
                f"in space=nasbench201; choice {choice.name!r} is none. Other mixed ops fit every "
                "space: softmax, beta_softmax, sigmoid, gumbel, binary_gate, one_shot, "
                "single_path"
            )
        if candidates.width % self.share:
            raise ValueError(
                f"mixed_op.share={self.share} does not divide the {candidates.width} channels of "
                f"choice {choice.name!r}; take a divisor of every width of the space"
            )
        if self.edge_norm and choice.into is None:
            raise ValueError(
                "mixed_op.edge_norm=true needs choices that name the node they go into "
                f"(Choice.into), as in space=nasbench201; choice {choice.name!r} names none: set "
                "mixed_op.edge_norm=false"
            )
        return PartialOp(choice, candidates, self.share)
