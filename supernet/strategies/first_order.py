"""First-order alternation (Liu et al. 2019, section 2.3; Cai et al. 2019, section 3.2.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.answer import LEAST_USE, Answer, BestRanked, MostProbable, Refined
from supernet.engine import (
    Diverged,
    at_least_float,
    average_gradients,
    frozen,
    holds_everywhere,
)
from supernet.mixed_ops.base import Sample, Weights
from supernet.strategies.base import Problem, Run, Strategy
from supernet.strategies.epoch_log import EpochLog
from supernet.strategies.monitor import Monitor
from supernet.strategies.perturbation import Perturbation, as_ranked
from supernet.strategies.ranking import Ranking
from supernet.strategies.refinement import Refinement
from supernet.strategies.state import SearchState


class FirstOrder(Strategy):
    """Warm-up on the weights alone, then weight steps on one half of the training set alternating
    with architecture steps on the other, the weights taken as they are.

    Args:
        epochs: passes over the weight half, warm-up included.
        warmup_epochs: of them, on weights only.
        arch_every: weight steps to one architecture step.
        batch_size: images a step and process.
        weight_optimizer: arguments of timm's `create_optimizer_v2`.
        arch_optimizer: the same, for the logits.
        scheduler: arguments of timm's `create_scheduler_v2` for the weight optimizer.
        clip_grad: largest norm of the weights' gradient; None for no clipping.
        init_std: standard deviation of the normal the logits start from.
        channels_last: memory format of the supernet and its inputs.
        safeguard: keep options that compute nothing from winning (`SearchSpace.safeguards`).
        ranking: how a relaxation without logits chooses; None where it is trained alone.
        monitor: watches one with logits for collapse; None for none.
        selection: settles its choices by perturbation; None takes the most probable ones.
        refinement: of what is derived in the end; None takes it as it is.
    """

    def __init__(
        self,
        *,
        epochs: int,
        warmup_epochs: int,
        arch_every: int,
        batch_size: int,
        weight_optimizer: Mapping[str, Any],
        arch_optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        clip_grad: float | None,
        init_std: float,
        channels_last: bool,
        safeguard: bool = True,
        ranking: Ranking | None,
        monitor: Monitor | None = None,
        selection: Perturbation | None = None,
        refinement: Refinement | None = None,
    ) -> None:
        if not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"strategy.warmup_epochs must be at least 0 and below strategy.epochs={epochs}; "
                f"got {warmup_epochs}"
            )
        if arch_every < 1:
            raise ValueError(f"strategy.arch_every must be 1 or more; got {arch_every}")
        self.epochs, self.warmup_epochs, self.arch_every = epochs, warmup_epochs, arch_every
        self.batch_size, self.clip_grad, self.init_std = batch_size, clip_grad, init_std
        self.weight_optimizer, self.arch_optimizer = dict(weight_optimizer), dict(arch_optimizer)
        self.scheduler = dict(scheduler)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.safeguard, self.ranking, self.monitor = safeguard, ranking, monitor
        self.selection, self.refinement = selection, refinement

    @classmethod
    def of_weights(
        cls,
        *,
        epochs: int,
        batch_size: int,
        weight_optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        clip_grad: float | None,
        channels_last: bool,
    ) -> FirstOrder:
        """To `train` the weights of a relaxation without logits, and nothing else."""
        return cls(
            epochs=epochs, warmup_epochs=0, arch_every=1, batch_size=batch_size,
            weight_optimizer=weight_optimizer, arch_optimizer={}, scheduler=scheduler,
            clip_grad=clip_grad, init_std=0.0, channels_last=channels_last, ranking=None,
        )  # fmt: skip

    def start(self, problem: Problem) -> SearchState:
        """Everything at its beginning."""
        return SearchState(
            problem,
            self.batch_size,
            self.weight_optimizer,
            self.arch_optimizer,
            self.init_std,
            self.memory_format,
        )

    def search(self, problem: Problem, run: Run) -> Answer:
        if problem.relaxation.has_logits and not problem.objective.differentiable:
            raise ValueError(
                f"the objective {type(problem.objective).__name__} ranks single architectures and "
                "has no loss for architecture steps: choose another one (objective=budget), or a "
                "strategy that tries architectures (strategy=evolution)"
            )
        if self.monitor is not None:
            self.monitor.check(problem.relaxation)
        if self.selection is not None:
            self.selection.check(problem.relaxation)
        if self.refinement is not None:
            self.refinement.check(problem)
        state = self.start(problem)
        if (saved := run.load()) is not None:
            state.load_state_dict(saved)
        self.train(state, run)
        if not problem.relaxation.has_logits:
            self.rank(state, run)
            return self.answer(problem, state.state_dict())
        if self.selection is not None:
            self.selection.select(state, run, partial(self.weight_step, state, 1.0))
        if self.refinement is not None:
            self._refine(state, run)
        return self.answer(problem, state.state_dict())

    def rank(self, state: SearchState, run: Run) -> None:
        """Choose where there are no logits."""
        assert self.ranking is not None, "trained alone"
        self.ranking.rank(state, run)

    def answer(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        if not problem.relaxation.has_logits:
            return BestRanked(problem.space, state["ranked"], problem.limits)
        derived = self._derived(problem, state)
        if self.refinement is None or not state["ranked"]:
            return derived
        leaders = self.refinement.leaders(state["ranked"])
        return Refined(BestRanked(problem.space, leaders, problem.limits), derived)

    def _refine(self, state: SearchState, run: Run) -> None:
        assert self.refinement is not None
        problem = state.problem
        start = self._derived(problem, state.state_dict()).best(problem.objective.budget)
        scores = problem.space.scores(problem.scores(state.parameters()))
        place = {"step": state.step, "epoch": state.weight_stream.epoch}
        for _ in self.refinement.refine(problem, run, start, scores, state.ranked, place):
            run.save(state.state_dict())

    def _derived(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        logits = {k.removeprefix("logits."): v.detach() for k, v in state["logits"].items()}
        scores = problem.scores(logits)
        # A learned multiplier comes and goes by little where the expectation stays at the budget.
        learned = {"multiplier": 0.0, "used": 0.0, **state["objective"]}
        priced = learned["multiplier"] > 0 or learned["used"] >= LEAST_USE
        derived: Answer = MostProbable(
            problem.space, scores, problem.additive, problem.limits, priced,
            guarded=self.safeguard, inputs=problem.inputs(logits),
        )  # fmt: skip
        selected = state.get("selected", {})
        # and invalid, while a node has too many edges
        complete = len(selected) == len(problem.space.decided)
        if complete and problem.space.is_valid(problem.space.architecture(selected)):
            ranked = BestRanked(problem.space, [as_ranked(problem, selected)], problem.limits)
            derived = Refined(ranked, derived)
        return derived

    def train(self, state: SearchState, run: Run) -> None:
        """Run from the present step to the last; a log line and a checkpoint an epoch."""
        num_steps = len(state.weight_stream.loader)
        searching_steps = (self.epochs - self.warmup_epochs) * num_steps
        state.problem.objective.num_steps = max(1, searching_steps // self.arch_every)
        scheduler, _ = create_scheduler_v2(
            state.weight_optimizer.optimizer, **{"num_epochs": self.epochs, **self.scheduler}
        )
        first = state.step // num_steps
        # Making a scheduler resets the rate, and there may be no epoch left that sets it.
        scheduler.step(min(first, self.epochs - 1))
        log = EpochLog(state, run, self.epochs)
        state.problem.supernet.train()
        for epoch in range(first, self.epochs):
            if state.monitor.over:
                break
            scheduler.step(epoch)
            searching = epoch >= self.warmup_epochs
            end = (epoch + 1) * num_steps
            done = state.step - epoch * num_steps
            with run.progress(num_steps, done, log.title(epoch, searching)) as bar:
                while state.step < end:
                    progress = self.progress(state, num_steps)
                    self.weight_step(state, progress)
                    state.step += 1
                    if searching and state.logits_optimizer and state.step % self.arch_every == 0:
                        self.architecture_step(state, progress)
                    bar.update()
                    if state.step % run.checkpoint_every == 0 and state.step < end:
                        run.save(state.state_dict())
            watched = self.monitor if searching and state.logits_optimizer else None
            more = watched.measure(state, epoch, self.memory_format) if watched else {}
            if searching:
                more |= self.after_epoch(state, run)
            record = log.end_epoch(epoch, searching, more)
            if watched:
                watched.judge(state, run, record)
            run.save(state.state_dict())

    def after_epoch(self, state: SearchState, run: Run) -> dict[str, Any]:
        """What else an epoch of the search does, after its steps; by default nothing.

        Returns:
            For the journal.
        """
        return {}

    def progress(self, state: SearchState, num_steps: int) -> float:
        """Share done of the steps that a relaxation's schedules run over: with logits those after
        the warm-up, which is at 0; without, all, since there are no architecture steps to wait for.

        Args:
            num_steps: of the weights, in an epoch.
        """
        first = self.warmup_epochs * num_steps if state.problem.relaxation.has_logits else 0
        return max(0, state.step - first) / (self.epochs * num_steps - first)

    def weight_step(
        self, state: SearchState, progress: float, fixed: Weights | None = None
    ) -> None:
        """One step of the weights on the weight half.

        Args:
            fixed: weights of choices that are settled.
        """
        accelerator = state.problem.accelerator
        images, labels = state.weight_stream.next()
        weights = {**self.weights(state, progress), **(fixed or {})}
        state.weight_optimizer.zero_grad()  # to None: what does not run must not move
        with accelerator.autocast():
            outputs = state.wrapped(images.to(memory_format=self.memory_format), weights)
        loss = cross_entropy(at_least_float(outputs), labels)
        accelerator.backward(loss)
        if self.clip_grad is not None:
            accelerator.clip_grad_norm_(state.wrapped.parameters(), self.clip_grad)
        state.weight_optimizer.step()
        state.weight_meter.add(loss, outputs, labels)

    def weights(self, state: SearchState, progress: float) -> Weights:
        """Those of a weight step."""
        relaxation = state.problem.relaxation
        return relaxation.for_weight_step(state.parameters(), state.generator, progress)

    def architecture_step(self, state: SearchState, progress: float) -> None:
        """One step of the logits on the architecture half, then one of the multipliers."""
        problem, accelerator = state.problem, state.problem.accelerator
        assert state.logits_optimizer is not None
        images, labels = state.arch_stream.next()
        images = images.to(memory_format=self.memory_format)
        logits = state.parameters()
        sample = self.sample(state, logits, progress)
        with frozen(problem.supernet):
            task_loss, outputs = self.task_loss(state, sample, images, labels)
            finite = math.isfinite(value := task_loss.detach().item())
            if not holds_everywhere(finite, accelerator):  # before the logits take it up
                found = "not finite in another process" if finite else value
                raise Diverged(
                    f"the loss of an architecture step is {found} after {state.step} weight steps; "
                    "lower weight_optimizer.lr or set clip_grad"
                )
            shares = problem.shares(sample.cost_weights)
            cost = problem.additive.expected(shares)
            limited = problem.expected(shares)
            state.logits_optimizer.zero_grad()
            penalty = problem.relaxation.penalty(logits, progress)
            # The gradient of logits that a sample leaves out is zero, not missing.
            nothing = 0.0 * sum(vector.sum() for vector in logits.values())
            loss = problem.objective.loss(task_loss, cost, limited) + penalty + nothing
            accelerator.backward(loss)
        average_gradients(state.parameters.parameters(), accelerator)
        state.logits_optimizer.step()
        problem.relaxation.after_step(logits, sample)
        expected = {name: float(value.detach()) for name, value in limited.items()}
        problem.objective.update(float(cost.detach()), expected)
        state.arch_meter.add(task_loss, outputs, labels)

    def sample(self, state: SearchState, logits: Mapping[str, Tensor], progress: float) -> Sample:
        """Weights of an architecture step."""
        return state.problem.relaxation.for_architecture_step(logits, state.generator, progress)

    def task_loss(
        self, state: SearchState, sample: Sample, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of an architecture step, differentiable in the logits, and the outputs.

        Args:
            images: (N, in_chans, H, W) of the architecture half.
            labels: (N,).
        """
        # Past DDP: logits are not its parameters, they are averaged by the caller.
        with state.problem.accelerator.autocast():
            outputs = state.problem.supernet(images, sample.weights)
        return cross_entropy(at_least_float(outputs), labels), outputs
