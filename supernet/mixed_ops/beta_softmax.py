"""beta-DARTS (Ye et al. 2022): DARTS whose logits are kept from growing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from supernet.mixed_ops.softmax import Softmax


class BetaSoftmax(Softmax):
    """The mixture of DARTS, with lambda(t) mean_choices log sum_i exp(a_i) added to the loss of an
    architecture step; lambda grows linearly from 0 in the first of them.

    Args:
        weight: lambda at the end of the search (50 for NAS-Bench-201 in the paper).
    """

    def __init__(self, weight: float = 50.0) -> None:
        if weight < 0:
            raise ValueError(f"mixed_op.weight must be at least 0; got {weight}")
        self.weight = weight

    def penalty(self, logits: Mapping[str, Tensor], progress: float) -> Tensor:
        smooth = torch.stack([torch.logsumexp(vector, dim=0) for vector in logits.values()])
        return self.weight * progress * smooth.mean()
