"""A mixed op: one candidate of each choice a step, drawn uniformly (Guo et al. 2020)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample


class SinglePath(Relaxation):
    has_logits = False  # after training, sampled architectures are ranked, as for one_shot

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        return {
            name: PathWeights((int(torch.randint(len(vector), (1,), generator=generator)),))
            for name, vector in logits.items()
        }

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        raise AssertionError("no logits, hence no architecture step")
