"""DARTS-PT (Wang et al. 2021, algorithm 1): options are judged by what is lost without them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.choice import Choice
from supernet.data import Loader
from supernet.derive import is_feasible
from supernet.engine import at_least_float, kept_buffers
from supernet.limits import Disagreement, Limit
from supernet.mixed_ops.base import PathWeights, Relaxation
from supernet.space import SearchSpace
from supernet.strategies.base import Problem, Run
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)

T = TypeVar("T")
Tune = Callable[[Mapping[str, PathWeights]], None]


class Perturbation:
    """After a search with logits, settles one choice after the other, in random order: the option
    without which the accuracy on the architecture half is lowest stays alone, and the weights of
    the supernet get used to that (the authors' code goes on with the logits, too).

    The weight of the option that is tried is set to zero, the others stay as they are, and batch
    norms use the batch's own statistics, as in the authors' code for NAS-Bench-201. Only options
    with which some valid architecture is within budget and limits can be chosen, so that the
    outcome is one.

    Where constraints leave edges out (`darts`), that is no option to compare with others: without
    `none` nothing is lost. As in the paper's second phase, all edges have their operation by then,
    and node after node, in random order, drops the edge without which the accuracy is highest until
    it has as many as it may have.

    Args:
        steps: weight steps after each choice and each node but the last.
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
        """Settle all choices into `state.selected`; a resume goes on after `state.decided`.

        Args:
            tune: one weight step with some choices fixed.
        """
        space = state.problem.space
        generator = torch.Generator().manual_seed(state.problem.seed)
        order, groups = _shuffled(space.decided, generator), _shuffled(tied(space), generator)
        judges, total = list(self._judges(state)), len(order) + len(groups)
        for group in state.weight_optimizer.param_groups:
            group["lr"] = self.lr
        state.problem.supernet.train()
        if not state.decided:
            state.weight_meter.sums.zero_()
        with run.progress(total, state.decided, "selection") as bar:
            for place in range(total):
                if place == state.decided:
                    if place < len(order):
                        record = self._settle(state, order[place], judges)
                    else:
                        record = self._wire(state, groups, place - len(order), judges)
                    self._end_decision(state, run, record)
                    bar.update()
                if place == state.decided - 1 < total - 1:
                    self._tune(state, run, tune)
        if run.main:
            chosen = [state.selected[choice.name] for choice in space.decided]
            log.info("selection by perturbation: %s", " ".join(chosen))

    def _settle(
        self, state: SearchState, choice: Choice, judges: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """One choice; returns what the journal says of it."""
        found = {}
        allowed = selectable(state.problem, state.selected, choice)
        if len(allowed) > 1:
            found = {o: self.accuracy(state, choice, o, judges) for o in allowed}
            option = min(allowed, key=lambda o: (found[o][0], -found[o][1]))
        else:
            (option,) = allowed
        state.selected[choice.name] = option
        return {"choice": choice.name, "option": option, "without": _figures(found)}

    def _wire(
        self,
        state: SearchState,
        groups: list[dict[str, str]],
        index: int,
        judges: list[tuple[Tensor, Tensor]],
    ) -> dict[str, Any]:
        """The edges of one node, those of the nodes before it being fixed; returns as `_settle`."""
        problem, selected, absent = state.problem, state.selected, groups[index]
        later = {name: option for group in groups[index:] for name, option in group.items()}
        dropped, rounds = [], []
        while True:
            settled = _left(selected, later)
            whole = {name: (selected[name],) for name in absent}
            if _can_be(problem, {**settled, **whole}):
                break
            edges = [
                name
                for name, none in absent.items()
                if selected[name] != none and _can_be(problem, {**settled, name: (none,)})
            ]
            assert edges, f"neither kept nor left out: {whole}"
            found = {}
            if len(edges) > 1:
                by_name = problem.space.by_name
                found = {e: self.accuracy(state, by_name[e], selected[e], judges) for e in edges}
                dropped.append(max(edges, key=lambda e: (found[e][0], -found[e][1])))
            else:
                dropped += edges
            rounds.append(_figures(found))
            selected[dropped[-1]] = absent[dropped[-1]]
        return {"edges": list(absent), "dropped": dropped, "without": rounds}

    def _end_decision(self, state: SearchState, run: Run, record: dict[str, Any]) -> None:
        loss, accuracy = state.weight_meter.read(state.problem.accelerator)
        state.weight_meter.sums.zero_()
        run.log({
            "step": state.step + state.decided * self.steps, "epoch": state.weight_stream.epoch,
            "phase": "select", **record,
            "train_loss": loss if state.tuned else None,
            "train_accuracy": accuracy if state.tuned else None,
        })  # fmt: skip
        state.decided, state.tuned = state.decided + 1, 0
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
        """(accuracy in percent, loss) of the supernet without one option of one choice; without
        the one that it is settled on, the choice is absent."""
        problem, accelerator = state.problem, state.problem.accelerator
        paths = problem.relaxation.for_weight_step(state.parameters(), state.generator, 1.0)
        weights = {**paths, **settled(state)}
        path, removed = weights[choice.name], choice.index(option)
        if choice.name in state.selected:
            assert choice.absent is not None
            weights[choice.name] = PathWeights((choice.index(choice.absent),))
        else:
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


def tied(space: SearchSpace) -> list[dict[str, str]]:
    """The groups of choices of which constraints leave some out: by name, what stands for that."""
    groups = []
    for ways in space.ways():
        all_absent = ((name, space.by_name[name].absent) for name, _ in ways[0])
        absent = {name: option for name, option in all_absent if option is not None}
        if len(ways[0]) > 1 and any(pair in absent.items() for way in ways for pair in way):
            groups.append(absent)
    return groups


def selectable(problem: Problem, selected: Mapping[str, str], choice: Choice) -> list[str]:
    """The options with which a valid architecture within budget and limits remains. An edge is
    not left out before its node's turn comes, unless nothing else remains."""
    absent = {name: option for group in tied(problem.space) for name, option in group.items()}
    settled = _left(selected, absent)
    options = [
        option
        for option in problem.space.allowed(choice)
        if option != absent.get(choice.name)
        and _can_be(problem, {**settled, choice.name: (option,)})
    ]
    return options or [absent[choice.name]]


def _left(selected: Mapping[str, str], absent: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The options that are left to settled choices, some of which may still be absent."""
    return {n: (o, absent[n]) if n in absent else (o,) for n, o in selected.items()}


def _can_be(problem: Problem, settled: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a valid architecture within budget and limits keeps to what is settled."""
    limits = [*problem.limits, Limit(Disagreement(settled), 0)]
    if problem.objective.budget is not None:
        limits.append(Limit(problem.cost, problem.objective.budget))
    return is_feasible(problem.space, limits)


def _shuffled(items: Sequence[T], generator: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def _figures(found: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"accuracy": a, "loss": lost} for name, (a, lost) in found.items()}


def as_ranked(problem: Problem, selected: Mapping[str, str]) -> dict[str, Any]:
    """What is selected, as something that was ranked."""
    cost = problem.cost.of(problem.space.architecture(selected))
    return {
        "architecture": selected, "cost": cost, "rank_value": 0.0, "loss": 0.0, "candidate": 0,
    }  # fmt: skip
