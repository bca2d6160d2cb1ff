"""Single path one-shot (Guo et al. 2020, section 3.3): one path a step, drawn uniformly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample, one_hot
from supernet.space import SearchSpace


class SinglePath(Relaxation):
    """No logits: the shared weights alone are trained, each step those of one architecture.

    It is drawn uniformly from the valid ones (`SearchSpace.sample`): one option of each choice
    where choices are independent; where constraints tie them, as in the cells of darts, a valid
    way of each group. What is excluded is not trained.
    """

    has_logits: ClassVar[bool] = False

    def __init__(self) -> None:
        self._space: SearchSpace | None = None

    def begin(self, space: SearchSpace) -> None:
        self._space = space

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        assert self._space is not None, "begin comes first"
        return one_hot(self._space.sample(generator), self._space.choices)

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        raise AssertionError("single_path has no logits, hence no architecture step")
