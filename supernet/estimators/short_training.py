"""What a short training of its own tells of an architecture."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from supernet.choice import Architecture
from supernet.data import Loader, Split, Stream
from supernet.engine import Alone, Diverged
from supernet.evaluate import evaluate
from supernet.learner import Learner
from supernet.recipe import Recipe, seeded
from supernet.space import SearchSpace
from supernet.strategies.base import Problem, rank_record

log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """Outcome of a training.

    Attributes:
        accuracy: on the architecture half, in percent.
        loss: there.
    """

    accuracy: float
    loss: float


def check_precision(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse another precision than the search's, in which short trainings run.

    Raises:
        ValueError: the recipe asks for one.
    """
    if recipe.mixed_precision not in ("no", accelerator.mixed_precision):
        raise ValueError(
            f"mixed_precision={recipe.mixed_precision!r} in the recipe of short trainings: they "
            f"run in the search's precision, {accelerator.mixed_precision!r} here; set precision="
            f"{recipe.mixed_precision} for both, or leave it out of the recipe"
        )


class ShortTraining:
    """Judges architectures by training each from scratch on the weight half for some steps.

    All start from the same seed and see the same images in the same order, in each repeat another
    one. Several processes train one network together, or each another one by itself, with the
    numbers that one process has.

    Args:
        recipe: how they are trained, in the search's precision; its schedule spans the training,
            however short (`epochs` is that of the schedule's own unit, 1 for a schedule of steps
            alone).
        num_images: of the architecture half that judge, in each process; all where it is smaller.
        settings: of the space in which the trained networks differ from the search's.
        alone: whether each process trains by itself.

    Raises:
        ValueError: the recipe asks for another precision.
    """

    def __init__(
        self,
        problem: Problem,
        recipe: Recipe,
        num_images: int,
        settings: Mapping[str, Any] | None = None,
        alone: bool = False,
    ) -> None:
        check_precision(recipe, problem.accelerator)
        self.accelerator = Alone(problem.accelerator) if alone else problem.accelerator
        self.problem, self.recipe = problem, recipe
        self.settings = dict(settings or {})
        self.train_half, arch_half = problem.data.search_splits(problem.seed)
        # In an order of its own: the half itself may be sorted by class.
        loader = self._loader(arch_half, problem.seed, augment=False)
        batches = min(len(loader), math.ceil(num_images / recipe.batch_size))
        self.judges = [loader.batch(0, index) for index in range(batches)]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass over the weight half."""
        return len(self._loader(self.train_half, self.problem.seed, augment=True))

    def _loader(self, half: Split, seed: int, augment: bool) -> Loader:
        accelerator = self.accelerator
        return Loader(
            half,
            batch_size=self.recipe.batch_size,
            seed=seed,
            train=True,
            augment=augment,
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    def judge(self, architecture: Architecture, steps: int, repeat: int = 0) -> Trained:
        """What the architecture is after `steps` steps.

        Args:
            repeat: which of its trainings; the images that judge are the same in all.

        Raises:
            Diverged: the loss is not finite.
        """
        with self._trained(architecture, steps, repeat) as learner:
            learner.average_buffers()
            judges = ((x.to(memory_format=self.recipe.memory_format), y) for x, y in self.judges)
            return Trained(*evaluate(learner.network, judges, self.accelerator))

    def record(self, architecture: Architecture, steps: int, repeat: int = 0) -> dict[str, Any]:
        """What the journal says of `judge`; who diverges has the largest loss there is."""
        try:
            found = self.judge(architecture, steps, repeat)
        except Diverged as error:
            log.warning("an architecture is out: %s", error)
            found = Trained(0.0, sys.float_info.max)
        return {"steps": steps, **rank_record(self.problem, architecture, *found)}

    @contextmanager
    def _trained(self, architecture: Architecture, steps: int, repeat: int) -> Iterator[Learner]:
        problem = self.problem
        seed = int(np.random.SeedSequence((problem.seed, repeat)).generate_state(1)[0])
        resized = SearchSpace.resized(architecture, self.settings)
        space = SearchSpace.of(resized)
        with seeded(seed):
            network = space.build_network(resized, problem.data.info.num_classes)
        stream = Stream(self._loader(self.train_half, seed, augment=True))
        learner = Learner(network, self.recipe, steps, self.accelerator, seed)
        try:
            network.train()
            for _ in range(steps):
                learner.take_step(*stream.next())
            yield learner
        finally:
            self.accelerator.free_memory()  # else it keeps this network while others train
