"""Peak activation memory of a forward pass, counted exactly and without running it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latency.tape import Tape, storage
from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates
from supernet.network import Network
from supernet.space import LinearConstraint, SearchSpace

Inputs = Tensor | Sequence[Tensor]


def peak_memory(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Largest number of bytes that activations take at once in an evaluation pass.

    The network runs on tensors without content, operation by operation in its own order. A
    tensor's memory is taken by the operation that creates it and given back after the last one
    that reads it or a view of it. The input counts, until it was read for the last time;
    parameters and buffers do not, nor does what an operation needs for itself. In-place operations
    take no memory, nor does a batch norm that alone reads the output of a convolution or a linear
    layer: it is folded into that layer when the network is deployed.

    Args:
        network: left as it was.
        input_shape: batch included.
    """
    tape = Tape()
    tape.run(network, input_shape)
    return tape.peak()


@dataclass(frozen=True)
class _Call:
    """What a candidate did in one call: equal calls need the same memory in any network.

    Attributes:
        touched: by operation, storages by number: 0 is the input's, -1, -2, ... those of further
            inputs; others are counted from 1, as they are created.
        sizes: of the created storages.
        folding: of them, those that a batch norm can be folded into.
        norms: operation, and storages of input and output.
        output: storage of the output.
        shape: of the output.
    """

    touched: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    folding: tuple[int, ...]
    norms: tuple[tuple[int, int, int], ...]
    output: int
    shape: tuple[int, ...]

    @property
    def reads(self) -> frozenset[int]:
        """The inputs that operations touch."""
        return frozenset(number for storages in self.touched for number in storages if number <= 0)


def _watch(module: nn.Module, tape: Tape, calls: list[_Call]) -> nn.Module:
    """Append what `module` does when it is called."""
    start: list[tuple[int, int]] = []

    def enter(module: nn.Module, args: tuple[Inputs, ...]) -> None:
        start.append((len(tape.touched), len(tape.norms)))

    def leave(module: nn.Module, args: tuple[Inputs, ...], output: Tensor) -> None:
        step, norm = start.pop()
        numbers = {storage(x): -number for number, x in enumerate(_inputs(args[0]))}
        num_inputs = len(numbers)
        for storages in tape.touched[step:]:
            for one in tape.sizes:  # in the order of their creation
                if one in storages:
                    numbers.setdefault(one, len(numbers) - num_inputs + 1)
        touched = tape.touched[step:]
        calls.append(
            _Call(
                tuple(tuple(sorted(numbers[s] for s in storages)) for storages in touched),
                tuple(tape.sizes[s] for s in list(numbers)[num_inputs:]),
                tuple(number for s, number in numbers.items() if number > 0 and s in tape.folding),
                tuple((i - step, numbers[a], numbers[b]) for i, a, b in tape.norms[norm:]),
                numbers[storage(output)],
                tuple(output.shape),
            )
        )

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    return module


def _inputs(x: Inputs) -> Sequence[Tensor]:
    return [x] if isinstance(x, Tensor) else x


class _StandIn(nn.Module):
    """Needs no more memory than any of the candidates it stands for, one list of them a call."""

    def __init__(self, tape: Tape, candidates: Iterable[Sequence[_Call]]) -> None:
        super().__init__()
        self.tape, self.candidates = tape, iter(candidates)

    def forward(self, x: Inputs) -> Tensor:
        """The input itself, where there is one, one candidate hands it on and the others need as
        much; else a new tensor, as small as any of theirs, or without any memory where one hands on
        an input.
        """
        calls, inputs = next(self.candidates), _inputs(x)
        fresh = [call for call in calls if call.output > 0]
        smallest = min((call.sizes[call.output - 1] for call in fresh), default=math.inf)
        hands_on = len(fresh) < len(calls)
        output = inputs[0]
        if not (
            hands_on
            and len(inputs) == 1
            and self.tape.sizes[storage(output)] <= smallest
            and all(call.reads for call in fresh)
            and calls[0].shape == output.shape
        ):
            for number in frozenset.intersection(*(call.reads for call in calls)):
                self.tape.touch(inputs[-number])
            output = torch.empty(calls[0].shape, dtype=output.dtype, device=output.device)
            self.tape.sizes[storage(output)] = 0 if hands_on else int(smallest)
        self.tape.vague.add(storage(output))
        return output


class PeakMemory:
    """Peak memory of the architectures of a space, as a cost that can be limited.

    It is no sum: what an option needs depends on what else is alive meanwhile. Integer programs
    learn of it through rows that forbid combinations of options which already need too much when
    every other choice has a stand-in that needs no more than any of its candidates.

    Args:
        space: candidates read one tensor, or several in a list, and return one; no candidate that
            was excluded comes back.
        num_classes: outputs of the classifier.
        input_shape: (batch, in_chs, height, width).
        dtype: of all activations.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_classes: int,
        input_shape: tuple[int, int, int, int],
        dtype: str = "float32",
    ) -> None:
        self.name, self.unit = "peak_memory", "bytes"
        self.space, self.num_classes, self.input_shape = space, num_classes, input_shape
        self.itemsize = getattr(torch, dtype).itemsize
        self._positions = self._observe()
        self._alike = {choice.name: self._group(choice) for choice in space.choices}
        self._bounds: dict[frozenset[tuple[str, str]], int] = {}
        self._cuts: list[tuple[int, LinearConstraint]] = []

    def of(self, architecture: Architecture) -> int:
        """`peak_memory` of the derived network."""
        return self.at_least(dict(architecture))

    def at_least(self, options: Mapping[str, str]) -> int:
        """Bytes that every architecture with these options needs; exact where all are given.

        Args:
            options: {choice: option} of some choices.
        """
        alike = frozenset((name, self._alike[name][option]) for name, option in options.items())
        if alike not in self._bounds:
            self._bounds[alike] = self._peak(dict(alike)) * self.itemsize // 4
        return self._bounds[alike]

    def rows(self, upper: float) -> list[LinearConstraint]:
        """Options that need too much alone, and the combinations that were found so far."""
        too_large = {
            (choice.name, option): 1.0
            for choice in self.space.choices
            for option in choice.options
            if self.at_least({choice.name: option}) > upper
        }
        found = [row for bytes_, row in self._cuts if bytes_ > upper]
        return [LinearConstraint(too_large, upper=0.0), *found]

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """Forbids the options of `architecture` that are to blame, and all that are like them."""
        blamed = dict(architecture)
        for choice in self.space.choices:
            rest = {name: option for name, option in blamed.items() if name != choice.name}
            if self.at_least(rest) > upper:
                blamed = rest
        terms = {
            (name, option): 1.0
            for name, chosen in blamed.items()
            for option, first in self._alike[name].items()
            if first == self._alike[name][chosen]
        }
        row = LinearConstraint(terms, upper=len(blamed) - 1.0)
        self._cuts.append((self.at_least(blamed), row))
        return row

    def _peak(self, options: Mapping[str, str]) -> int:
        tape, positions = Tape(), itertools.count()

        def select(choice: Choice, candidates: Candidates) -> nn.Module:
            _, calls = self._positions[next(positions)]
            if choice.name in options:
                return candidates[options[choice.name]]()
            if choice.absent in self.space.allowed(choice):
                return candidates[choice.absent]()
            allowed = [calls[option] for option in self.space.allowed(choice)]
            return _StandIn(tape, zip(*allowed, strict=True))

        tape.run(self._build(select), self.input_shape)
        return tape.peak()

    def _observe(self) -> list[tuple[str, dict[str, list[_Call]]]]:
        """By position, in the order of construction: its choice, and the calls of each option."""
        positions: list[tuple[str, dict[str, list[_Call]]]] = []
        for index in range(max(len(choice.options) for choice in self.space.choices)):
            tape, built = Tape(), itertools.count()

            def select(
                choice: Choice,
                candidates: Candidates,
                index: int = index,
                tape: Tape = tape,
                built: itertools.count[int] = built,
            ) -> nn.Module:
                if (position := next(built)) == len(positions):
                    positions.append((choice.name, {}))
                option = choice.options[min(index, len(choice.options) - 1)]
                calls = positions[position][1][option] = []
                return _watch(candidates[option](), tape, calls)

            tape.run(self._build(select), self.input_shape)
        return positions

    def _group(self, choice: Choice) -> dict[str, str]:
        """By option, the first one of the choice that does the same at every position."""
        groups: dict[tuple[tuple[_Call, ...], ...], str] = {}
        return {
            option: groups.setdefault(
                tuple(tuple(c[option]) for name, c in self._positions if name == choice.name),
                option,
            )
            for option in choice.options
        }

    def _build(self, select: Callable[[Choice, Candidates], nn.Module]) -> Network:
        with torch.device("meta"):
            return self.space.build(select, self.num_classes, search=False)
