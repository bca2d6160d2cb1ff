"""Accuracy of an architecture that was trained on its own."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

from supernet.choice import Architecture
from supernet.engine import Diverged
from supernet.estimators.base import Estimate, Estimator
from supernet.estimators.short_training import ShortTraining
from supernet.recipe import Recipe
from supernet.strategies.base import Problem, Run

log = logging.getLogger(__name__)


class FromScratch(Estimator):
    """Trains each on the weight half, and judges it on the architecture half.

    All start from the same seed and see the same images in the same order. Of several processes
    each trains another network.

    Args:
        recipe: of the trainings; its schedule spans each of them.
        epochs, steps: how long each takes; one of the two is given.
        num_images: of the architecture half that judge.
        settings: of the space in which the trained networks differ from the search's.
    """

    judge, judges_parts = "training from scratch", True

    def __init__(
        self,
        *,
        recipe: Recipe,
        num_images: int,
        epochs: float | None = None,
        steps: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ValueError(
                "estimator=from_scratch trains for estimator.epochs or for estimator.steps: set "
                f"one of them, and the other to null; got {epochs=}, {steps=}"
            )
        given = {"epochs": epochs, "steps": steps, "num_images": num_images}
        for name, value in given.items():
            kinds = int | float if name == "epochs" else int
            if value is not None and not (isinstance(value, kinds) and value > 0):
                what = "a number" if name == "epochs" else "a whole number"
                raise ValueError(f"estimator.{name} must be {what} above 0; got {value!r}")
        self.recipe, self.num_images, self.settings = recipe, num_images, settings
        self.epochs, self.steps = epochs, steps

    def prepare(self, problem: Problem, run: Run, saved: Mapping[str, Any] | None) -> None:
        self._training = ShortTraining(
            problem, self.recipe, self.num_images, self.settings, alone=True
        )
        if self.steps is not None:
            self.num_steps = self.steps
        else:
            assert self.epochs is not None
            self.num_steps = math.ceil(self.epochs * self._training.steps_per_epoch)

    def estimate(self, architecture: Architecture) -> Estimate:
        """Who diverges has no accuracy, and the largest loss there is."""
        try:
            return Estimate(*self._training.judge(architecture, self.num_steps))
        except Diverged as error:
            log.warning("an architecture is out: %s", error)
            return Estimate(0.0, sys.float_info.max)
