"""FairDARTS (Chu et al. 2020): candidates do not compete, y = sum_i sigmoid(logits)_i o_i(x)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample


class Sigmoid(Relaxation):
    """Every candidate runs, each with a weight of its own in (0, 1).

    Args:
        zero_one: weight of the loss that drives every sigmoid to 0 or 1,
            -1/N sum_i (sigmoid(a_i) - 0.5)^2 (10 in the paper).
    """

    competing = False
    mixes_all = True

    def __init__(self, zero_one: float = 10.0) -> None:
        if zero_one < 0:
            raise ValueError(f"mixed_op.zero_one must be at least 0; got {zero_one}")
        self.zero_one = zero_one

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        return _all_paths({name: vector.detach() for name, vector in logits.items()})

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        return Sample(_all_paths(logits), self.probabilities(logits))

    def penalty(self, logits: Mapping[str, Tensor], progress: float) -> Tensor:
        every = torch.cat(list(logits.values()))
        return -self.zero_one * (torch.sigmoid(every) - 0.5).square().mean()

    def probabilities(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sigmoids, scaled to a sum of one: for costs, entropies and logs."""
        gates = {name: torch.sigmoid(vector) for name, vector in logits.items()}
        return {name: gate / gate.sum() for name, gate in gates.items()}

    def scores(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: logsigmoid(vector.detach().double()) for name, vector in logits.items()}


def _all_paths(logits: Mapping[str, Tensor]) -> dict[str, PathWeights]:
    return {
        name: PathWeights(tuple(range(len(vector))), torch.sigmoid(vector))
        for name, vector in logits.items()
    }
