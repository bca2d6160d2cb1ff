"""DARTS (Liu et al. 2019, equation 2): y = sum_i softmax(logits)_i o_i(x)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample


class Softmax(Relaxation):
    """Every candidate runs in every step, weighted by its probability."""

    mixes_all = True

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        return _all_paths({name: p.detach() for name, p in self.probabilities(logits).items()})

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        probabilities = self.probabilities(logits)
        return Sample(_all_paths(probabilities), probabilities)


def _all_paths(probabilities: Mapping[str, Tensor]) -> dict[str, PathWeights]:
    return {name: PathWeights(tuple(range(len(p))), p) for name, p in probabilities.items()}
