"""DARTS-PT (Wang et al. 2021, algorithm 1): options are judged by what is lost without them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.choice import Choice
from supernet.data import Loader
from supernet.derive import is_feasible
from supernet.engine import at_least_float, kept_buffers
from supernet.limits import Disagreement, Limit
from supernet.mixed_ops.base import PathWeights, Relaxation
from supernet.strategies.base import Problem, Run
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)

Tune = Callable[[Mapping[str, PathWeights]], None]


class Perturbation:
    """After a search with logits, settles one choice after the other, in random order: the option
    without which the accuracy on the architecture half is lowest stays alone, and the weights of
    the supernet get used to that (the authors' code goes on with the logits, too).

    The weight of the option that is tried is set to zero, the others stay as they are, and batch
    norms use the batch's own statistics, as in the authors' code for NAS-Bench-201. Only options
    with which some valid architecture is within budget and limits can be chosen, so that the
    outcome is one.

    Args:
        steps: weight steps after each choice but the last.
        lr: their learning rate.
        num_images: of the architecture half that judge, in each process.
    """

    def __init__(self, *, steps: int, lr: float, num_images: int) -> None:
        for name, value, valid, wanted in (
            ("steps", steps, steps >= 0, "0 or more"),
            ("lr", lr, lr > 0, "above 0"),
            ("num_images", num_images, num_images >= 1, "1 or more"),
        ):
            if not valid:
                raise ValueError(f"strategy.selection.{name} must be {wanted}; got {value}")
        self.steps, self.lr, self.num_images = steps, lr, num_images

    def check(self, relaxation: Relaxation) -> None:
        """Refuse a relaxation from which no option can be taken away.

        Raises:
            ValueError: says what to use instead.
        """
        if not relaxation.mixes_all:
            raise ValueError(
                "strategy.selection needs a mixed op in which every candidate runs (softmax, "
                f"beta_softmax, sigmoid, partial_channels), not {type(relaxation).__name__}"
            )

    def select(self, state: SearchState, run: Run, tune: Tune) -> None:
        """Settle all choices into `state.selected`; a resume goes on from those it finds there.

        Args:
            tune: one weight step with some choices fixed.
        """
        choices = state.problem.space.choices
        generator = torch.Generator().manual_seed(state.problem.seed)
        order = [choices[i] for i in torch.randperm(len(choices), generator=generator).tolist()]
        judges = list(self._judges(state))
        for group in state.weight_optimizer.param_groups:
            group["lr"] = self.lr
        state.problem.supernet.train()
        if not state.selected:
            state.weight_meter.sums.zero_()
        with run.progress(len(order), len(state.selected), "selection") as bar:
            for place, choice in enumerate(order):
                if choice.name not in state.selected:
                    self._settle(state, run, choice, judges)
                    bar.update()
                if place == len(state.selected) - 1 < len(order) - 1:
                    self._tune(state, run, tune)
        if run.main:
            chosen = [state.selected[choice.name] for choice in choices]
            log.info("selection by perturbation: %s", " ".join(chosen))

    def _settle(
        self, state: SearchState, run: Run, choice: Choice, judges: list[tuple[Tensor, Tensor]]
    ) -> None:
        found = {}
        allowed = selectable(state.problem, state.selected, choice)
        if len(allowed) > 1:
            found = {o: self.accuracy(state, choice, o, judges) for o in allowed}
            option = min(allowed, key=lambda o: (found[o][0], -found[o][1]))
        else:
            (option,) = allowed
        loss, accuracy = state.weight_meter.read(state.problem.accelerator)
        state.weight_meter.sums.zero_()
        step = state.step + len(state.selected) * self.steps
        run.log({
            "step": step, "epoch": state.weight_stream.epoch,
            "phase": "select", "choice": choice.name, "option": option,
            "without": {o: {"accuracy": a, "loss": lost} for o, (a, lost) in found.items()},
            "train_loss": loss if state.tuned else None,
            "train_accuracy": accuracy if state.tuned else None,
        })  # fmt: skip
        state.selected[choice.name], state.tuned = option, 0
        run.save(state.state_dict())

    def _tune(self, state: SearchState, run: Run, tune: Tune) -> None:
        fixed = settled(state)
        with run.progress(self.steps, state.tuned, f"{len(fixed)} choices settled") as bar:
            while state.tuned < self.steps:
                tune(fixed)
                state.tuned += 1
                bar.update()
                if state.tuned % run.checkpoint_every == 0:
                    run.save(state.state_dict())

    @torch.no_grad()
    def accuracy(
        self,
        state: SearchState,
        choice: Choice,
        option: str,
        judges: list[tuple[Tensor, Tensor]],
    ) -> tuple[float, float]:
        """(accuracy in percent, loss) of the supernet without one option of one choice."""
        problem, accelerator = state.problem, state.problem.accelerator
        paths = problem.relaxation.for_weight_step(state.parameters(), state.generator, 1.0)
        weights = {**paths, **settled(state)}
        path, removed = weights[choice.name], choice.index(option)
        assert path.values is not None
        kept = [place for place, index in enumerate(path.active) if index != removed]
        active = tuple(path.active[place] for place in kept)
        weights[choice.name] = PathWeights(active, path.values[kept])
        totals = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        with kept_buffers(problem.supernet):
            for images, labels in judges:
                with accelerator.autocast():
                    outputs = problem.supernet(images, weights)
                loss = cross_entropy(at_least_float(outputs), labels, reduction="sum")
                correct = (outputs.argmax(dim=1) == labels).sum()
                totals += torch.stack([loss, correct, torch.tensor(len(labels)).to(loss)])
        loss_sum, num_correct, count = accelerator.reduce(totals, reduction="sum").tolist()
        return 100 * num_correct / count, loss_sum / count

    def _judges(self, state: SearchState) -> Iterator[tuple[Tensor, Tensor]]:
        stream = state.arch_stream.loader
        # in an order of its own: the half itself may be sorted by class
        loader = Loader(
            stream.split, batch_size=stream.batch_size, seed=stream.seed, train=True,
            augment=False, device=stream.device, rank=stream.rank, world_size=stream.world_size,
        )  # fmt: skip
        for index in range(min(len(loader), max(1, self.num_images // stream.batch_size))):
            yield loader.batch(0, index)


def settled(state: SearchState) -> dict[str, PathWeights]:
    """Weights of the choices that are settled: their option alone, at full weight."""
    by_name = state.problem.space.by_name
    return {name: PathWeights((by_name[name].index(o),)) for name, o in state.selected.items()}


def selectable(problem: Problem, selected: Mapping[str, str], choice: Choice) -> list[str]:
    """The options with which a valid architecture within budget and limits remains."""
    limits = [*problem.limits]
    if problem.objective.budget is not None:
        limits.append(Limit(problem.cost, problem.objective.budget))
    return [
        option
        for option in problem.space.allowed(choice)
        if is_feasible(
            problem.space, [*limits, Limit(Disagreement({**selected, choice.name: option}), 0)]
        )
    ]


def as_ranked(problem: Problem, selected: Mapping[str, str]) -> dict[str, Any]:
    """What is selected, as something that was ranked."""
    cost = problem.cost.of(problem.space.architecture(selected))
    return {
        "architecture": selected, "cost": cost, "rank_value": 0.0, "loss": 0.0, "candidate": 0,
    }  # fmt: skip
