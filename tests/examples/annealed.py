"""A mixed op: softmax at a temperature that falls (ASAP, Noy et al. 2020, without its pruning)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample


class Annealed(Relaxation):
    def __init__(self, start: float = 1.6, end: float = 0.12) -> None:  # 1.6 * 0.95 ** 50
        self.start, self.end = start, end

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        return self._mix({name: vector.detach() for name, vector in logits.items()}, progress)

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        return Sample(self._mix(logits, progress), cost_weights=self.probabilities(logits))

    def _mix(self, logits: Mapping[str, Tensor], progress: float) -> dict[str, PathWeights]:
        temperature = self.start * (self.end / self.start) ** progress
        return {
            name: PathWeights(tuple(range(len(v))), torch.softmax(v / temperature, dim=0))
            for name, v in logits.items()
        }
