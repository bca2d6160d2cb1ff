"""One-Shot (Bender et al. 2018): y = sum_i o_i(x), with paths dropped at random in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample


class OneShot(Relaxation):
    """No logits: the shared weights alone are trained, then architectures are ranked with them.

    Args:
        drop_rate: chance that a path is dropped in the last weight step; it grows linearly from 0
            (section 3.2). When all paths of a choice would go, one drawn uniformly stays.
    """

    has_logits: ClassVar[bool] = False

    def __init__(self, drop_rate: float = 0.5) -> None:
        if not 0 <= drop_rate < 1:
            raise ValueError(f"mixed_op.drop_rate must be in [0, 1); got {drop_rate}")
        self.drop_rate = drop_rate

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        rate = self.drop_rate * progress
        return {
            name: PathWeights(_survivors(len(vector), rate, generator))
            for name, vector in logits.items()
        }

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        raise AssertionError("one_shot has no logits, hence no architecture step")


def _survivors(num_options: int, rate: float, generator: torch.Generator) -> tuple[int, ...]:
    kept = torch.rand(num_options, generator=generator) >= rate
    last = int(torch.randint(num_options, (1,), generator=generator))
    return tuple(kept.nonzero().flatten().tolist()) or (last,)
