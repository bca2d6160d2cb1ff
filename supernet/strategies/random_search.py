"""Random search (Li & Talwalkar 2019, section 4): the baseline that every search has to beat."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from supernet.answer import Answer, BestTrained
from supernet.choice import Architecture
from supernet.estimators.short_training import ShortTraining
from supernet.recipe import Recipe
from supernet.strategies.base import Problem, Run, Strategy

log = logging.getLogger(__name__)

PURPOSE = 1  # beside the seed: by the seed alone, `Ranking` draws from the same range
MAX_DRAWS = 1000  # in a row that were all trained already: the range holds no others


class RandomSearch(Strategy):
    """Architectures drawn uniformly within budget and limits, each trained from scratch on the
    weight half; the best on the architecture half is the answer. The supernet is not trained.

    It ends where the first of its bounds is reached; at least one architecture is trained.

    Args:
        steps: of each training.
        recipe: of the trainings.
        num_images: of the architecture half that judge a network.
        num_samples: largest number of architectures; None for no bound.
        total_steps: no training begins that would bring all steps together above it.
        seconds: no training begins after so many: what another search took.
    """

    def __init__(
        self,
        *,
        steps: int,
        recipe: Recipe,
        num_images: int,
        num_samples: int | None = None,
        total_steps: int | None = None,
        seconds: float | None = None,
    ) -> None:
        bounds = {"num_samples": num_samples, "total_steps": total_steps, "seconds": seconds}
        for name, value in {"steps": steps, "num_images": num_images, **bounds}.items():
            if value is not None and value <= 0:
                raise ValueError(f"strategy.{name} must be above 0; got {value}")
        if all(value is None for value in bounds.values()):
            raise ValueError(
                "strategy=random would never end: set one or more of strategy.num_samples, "
                "strategy.total_steps, strategy.seconds"
            )
        self.steps, self.recipe, self.num_images = steps, recipe, num_images
        self.num_samples, self.total_steps, self.seconds = num_samples, total_steps, seconds

    def search(self, problem: Problem, run: Run) -> Answer:
        ranked = list((run.load() or {"ranked": []})["ranked"])
        judge = ShortTraining(problem, self.recipe, self.num_images)
        draws = _Draws(problem, ranked)
        with run.progress(self.num_samples or 0, len(ranked), "random search") as bar:
            while not self._is_over(len(ranked), run.seconds):
                architecture = draws.next()
                if architecture is None:
                    break
                ranked.append({
                    "step": (len(ranked) + 1) * self.steps, "epoch": 0, "candidate": len(ranked),
                    **judge.record(architecture, self.steps),
                })  # fmt: skip
                run.log(ranked[-1])
                run.save({"ranked": ranked})
                bar.update()
        answer = self.answer(problem, {"ranked": ranked})
        if run.main:
            best = min(ranked, key=lambda r: (r["rank_value"], r["loss"]))
            log.info(
                "random search: %d architectures, %d steps each; %s has %.1f%%",
                len(ranked), self.steps, " ".join(best["architecture"].values()), best["accuracy"],
            )  # fmt: skip
        return answer

    def answer(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        return BestTrained(problem.space, state["ranked"], problem.limits)

    def _is_over(self, done: int, seconds: float) -> bool:
        """The same in all processes."""
        over = done > 0 and (
            (self.num_samples is not None and done >= self.num_samples)
            or (self.total_steps is not None and (done + 1) * self.steps > self.total_steps)
            or (self.seconds is not None and seconds >= self.seconds)
        )
        return bool(broadcast_object_list([over])[0])


class _Draws:
    """Distinct architectures within budget and limits, after those that are trained already."""

    def __init__(self, problem: Problem, ranked: list[dict[str, Any]]) -> None:
        self.sampler = problem.sampler()
        seed = int(np.random.SeedSequence((problem.seed, PURPOSE)).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: set[Architecture] = set()
        for record in ranked:
            drawn = self.next()
            assert drawn == problem.space.architecture(record["architecture"]), drawn

    def next(self) -> Architecture | None:
        """The next one; None where all that the range holds were drawn."""
        for _ in range(MAX_DRAWS):
            drawn = self.sampler.sample(self.generator)
            if drawn not in self.seen:
                self.seen.add(drawn)
                return drawn
        return None
