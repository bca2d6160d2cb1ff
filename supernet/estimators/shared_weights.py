"""Accuracy of an architecture with the weights that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supernet.choice import Architecture
from supernet.estimators.base import Estimate, Estimator
from supernet.estimators.inherited import Inherited
from supernet.strategies.base import Problem, Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.state import SearchState


class SharedWeights(Estimator):
    """Trains the supernet on the weight half, and judges each architecture on the architecture
    half by what it inherits, batch norms recalibrated on the weight half (Bender et al. 2018,
    section 3; Guo et al. 2020, sections 3.2 to 3.4).

    The problem's relaxation says which paths a step trains; it has no logits. Several processes
    train one supernet, then each judges other architectures. A supernet is trained once, however
    many searches it serves.

    Args:
        epochs: of the training, passes over the weight half.
        batch_size: images a step and process.
        weight_optimizer: arguments of timm's `create_optimizer_v2`.
        scheduler: arguments of timm's `create_scheduler_v2`.
        clip_grad: largest norm of the gradient; None for no clipping.
        channels_last: memory format of the supernet and its inputs in training.
        judge_batch_size: images a batch of those that judge and recalibrate.
        bn_batches: batches that recalibrate.
        num_images: of the architecture half that judge, in whole batches; None for all.
    """

    judge = "inherited weights"

    def __init__(
        self,
        *,
        epochs: int,
        batch_size: int,
        weight_optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        clip_grad: float | None,
        channels_last: bool,
        judge_batch_size: int,
        bn_batches: int,
        num_images: int | None = None,
    ) -> None:
        given = {
            "epochs": epochs, "judge_batch_size": judge_batch_size, "bn_batches": bn_batches,
            "num_images": num_images,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"estimator.{name} must be 1 or more; got {value}")
        self.training = FirstOrder.of_weights(
            epochs=epochs,
            batch_size=batch_size,
            weight_optimizer=weight_optimizer,
            scheduler=scheduler,
            clip_grad=clip_grad,
            channels_last=channels_last,
        )
        self.judge_batch_size, self.bn_batches = judge_batch_size, bn_batches
        self.num_images = num_images
        self._state: SearchState | None = None

    def prepare(self, problem: Problem, run: Run, saved: Mapping[str, Any] | None) -> None:
        if self._state is not None and self._state.problem.supernet is problem.supernet:
            return
        if problem.relaxation.has_logits:
            raise ValueError(
                "estimator=shared_weights trains a supernet without logits, by mixed_op=single_path"
                f" or mixed_op=one_shot; {type(problem.relaxation).__name__} has logits: choose one"
                " of these, or a strategy that trains logits (strategy=first_order)"
            )
        state = self.training.start(problem)
        if saved is not None:
            state.load_state_dict(saved)
        self.training.train(state, run)
        self._state, self.steps_before = state, state.step
        self._judge = Inherited(
            problem, self.judge_batch_size, self.bn_batches, num_images=self.num_images
        )

    def estimate(self, architecture: Architecture) -> Estimate:
        return Estimate(*self._judge.accuracy(architecture))

    def state_dict(self) -> dict[str, Any]:
        assert self._state is not None, "prepare comes first"
        return self._state.state_dict()
