"""A cell of blocks, each of two operations on earlier states (Zoph et al. 2018, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from timm.layers import drop_path
from torch import Tensor, nn

from supernet.choice import Choice
from supernet.mixed_ops.base import Candidates, MixedOp, Parts, PathWeights, Searchable, Weights
from supernet.ops.darts import FactorizedReduction, Zero
from supernet.ops.nasbench201 import ReLUConvBN
from supernet.spaces.darts_cell import Concat
from supernet.spaces.nasbench201 import Sum

NUM_INPUTS = 2  # states 0 and 1: what the cell reads
USED, LOOSE = "used", "loose"  # a state that a block reads, and one that is part of the output
SIDES = ("left", "right")


@dataclass(frozen=True)
class End:
    """A state that is part of the cell's output where no block reads it.

    Attributes:
        state: its number.
        choice: implied, `USED` or `LOOSE`.
        readers: names of the choices that may read it.
        num_operations: options that such a choice has for each state, from state 0 on.
    """

    state: int
    choice: Choice
    readers: tuple[str, ...]
    num_operations: int

    def reads(self, option: int) -> bool:
        """Whether an option of a reader reads it."""
        return option // self.num_operations == self.state

    def may_be_loose(self, weights: Weights) -> bool:
        """Whether every reader has an active option that reads another state."""
        return not any(all(map(self.reads, weights[name].active)) for name in self.readers)

    def looseness(self, weights: Weights) -> Tensor | float:
        """1 less the share of a reader's weights that reads it, multiplied over all readers: for
        probabilities the probability that none does, for one option each 0 or 1."""
        product: Tensor | float = 1.0
        for name in self.readers:
            path = weights[name]
            reading = [i for i, option in enumerate(path.active) if self.reads(option)]
            if reading and (path.values is None or len(path.active) == 1):
                product = product * (1 - len(reading) / len(path.active))
            elif reading:
                assert path.values is not None
                product = product * (1 - path.values[reading].sum() / path.values.sum())
        return product


class From(Parts):
    """An operation on one of several states."""

    def __init__(self, source: int, operation: nn.Module) -> None:
        super().__init__()
        self.source, self.operation = source, operation

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return self.operation(states[self.source])


class Add(Parts):
    """The element-wise sum of two sides."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = Sum()

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        return self.sum(*terms)


class Join(Parts):
    """Two sides side by side, and a 1x1 convolution back to their width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.concat, self.conv = Concat(), ReLUConvBN(2 * width, width, 1)

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        return self.conv(self.concat(*terms))


class Contribution(Parts):
    """What a loose end adds to the sum that an entry is."""

    def __init__(self, reach: nn.Module) -> None:
        super().__init__()
        self.reach, self.sum = reach, Sum()

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        total, x = terms
        return self.sum(total, self.reach(x))


class Nothing(nn.Module):
    """What a used state adds. A derived network leaves it out."""

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        return terms[0]


def reach(in_chs: int, out_chs: int, stride: int) -> nn.Module:
    """ReLU and a 1x1 convolution; of stride 2 a factorized reduction without its norm."""
    if stride == 2:
        return FactorizedReduction(in_chs, out_chs, affine=True, norm=False)
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_chs, out_chs, 1, bias=False))


class Entry(Searchable):
    """Brings the output of an earlier cell to a cell's width and resolution: ReLU, 1x1 convolution
    (of stride 2 a factorized reduction), batch norm.

    The convolution of a concatenation is the sum of the convolutions of its parts. It is computed
    part by part, so that a part's cost is that of one end being loose.

    Args:
        width: of the parts of the input.
        ends: of the cell that is read; after them comes its last state, which is always loose.
        layers: by end, in the same order, `Contribution`, `Nothing` or both as a mixed op.
        last: of the last state, `reach`.
        out_chs: of the result.
    """

    def __init__(
        self,
        width: int,
        ends: Sequence[End],
        layers: Sequence[nn.Module],
        last: nn.Module,
        out_chs: int,
    ) -> None:
        super().__init__()
        kept = [
            (end, layer)
            for end, layer in zip(ends, layers, strict=True)
            if not isinstance(layer, Nothing)
        ]
        self.width, self.ends = width, [end for end, _ in kept]
        self.layers = nn.ModuleDict({f"state_{end.state}": layer for end, layer in kept})
        self.last = last
        self.norm = nn.BatchNorm2d(out_chs)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, num_parts * C, H, W) -> (N, out_chs, H / stride, W / stride)."""
        *parts, last = x.split(self.width, dim=1)
        total = self.last(last)
        for end, layer, part in zip(self.ends, self.layers.values(), parts, strict=True):
            if isinstance(layer, MixedOp):
                assert weights is not None
                if end.may_be_loose(weights):  # the part is multiplied by its looseness already
                    loose = PathWeights((end.choice.index(LOOSE),))
                    total = layer([total, part], {end.choice.name: loose})
            else:
                total = layer([total, part])
        return self.norm(total)


class BlockCell(Searchable):
    """Reads the outputs of the two cells before; its own is that of its loose ends, side by side.

    In a supernet the output has every state that may be loose, multiplied by its looseness; in a
    derived cell those that are, unless it is `padded`: then zeros stand for the others.

    Args:
        entries: bring the two inputs to the cell's width and resolution.
        blocks: of each block the layers of its left side, its right side and their combination.
        ends: states that can be loose, but for the last, which always is.
        outlets: by end, in the same order, what brings it to the output: `Zero` where it is used.
        padded: whether the width of the output is the same for every architecture.
    """

    def __init__(
        self,
        entries: Sequence[nn.Module],
        blocks: Sequence[Mapping[str, nn.Module]],
        ends: Sequence[End],
        outlets: Sequence[nn.Module],
        padded: bool,
    ) -> None:
        super().__init__()
        self.entries = nn.ModuleList(entries)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(block)) for block in blocks)
        kept = {
            f"state_{end.state}": outlet
            for end, outlet in zip(ends, outlets, strict=True)
            if not isinstance(outlet, Zero)
        }
        self.ends = [end for end in ends if padded or f"state_{end.state}" in kept]
        self.outlets = nn.ModuleDict(kept)
        self.drop_path_rate: float = 0.0

    @property
    def num_parts(self) -> int:
        """Of the output."""
        return len(self.ends) + 1

    def forward(self, before: Tensor, last: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, C', H', W'), (N, C'', H, W) -> (N, num_parts * C, H / stride, W / stride)."""
        states = [
            _run(entry, x, weights)
            for entry, x in zip(self.entries, (before, last), strict=True)
        ]
        for block in self.blocks:
            layers = cast(nn.ModuleDict, block)
            sides = [self._side(layers[side], states, weights) for side in SIDES]
            states.append(_run(layers["combine"], sides, weights))
        nothing = states[-1]
        if len(self.outlets) < len(self.ends):
            nothing = torch.zeros_like(nothing)
        parts = [
            self._outlet(end, states[end.state], weights)
            if f"state_{end.state}" in self.outlets
            else nothing
            for end in self.ends
        ]
        return torch.cat([*parts, states[-1]], dim=1)

    def _side(self, layer: nn.Module, states: list[Tensor], weights: Weights | None) -> Tensor:
        """In training, a derived cell drops paths that compute something."""
        y = _run(layer, states, weights)
        computes = isinstance(layer, From) and not isinstance(layer.operation, nn.Identity)
        if self.drop_path_rate and self.training and computes:
            y = drop_path(y, self.drop_path_rate, self.training)
        return y

    def _outlet(self, end: End, state: Tensor, weights: Weights | None) -> Tensor:
        outlet = self.outlets[f"state_{end.state}"]
        if not isinstance(outlet, MixedOp):
            return outlet(state)
        assert weights is not None
        path = PathWeights((end.choice.index(USED),))
        if end.may_be_loose(weights):
            looseness = torch.as_tensor(end.looseness(weights), device=state.device)
            path = PathWeights((end.choice.index(LOOSE),), looseness[None])
        return outlet(state, {end.choice.name: path})


def _run(layer: nn.Module, x: Any, weights: Weights | None) -> Tensor:
    """Call a fixed layer or a searchable one with a tensor, or with several in a list."""
    return layer(x, weights) if isinstance(layer, Searchable) else layer(x)


def outlet_builders(width: int, stride: int) -> Candidates:
    """Candidates of what brings a state to the output; `stride` is 2 for inputs to be reduced."""
    reduction = partial(FactorizedReduction, width, width, affine=True)
    return {USED: partial(Zero, stride), LOOSE: reduction if stride == 2 else nn.Identity}
