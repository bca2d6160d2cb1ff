"""What spaces have in common whose cells consist of blocks: two operations on two earlier states,
and their combination (Zoph et al. 2018, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from itertools import chain, product
from typing import ClassVar

import torch
from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates
from supernet.network import Auxiliary, Block, Network
from supernet.ops.blocks import BUILDERS
from supernet.ops.darts import AuxiliaryHead
from supernet.ops.nasbench201 import ReLUConvBN
from supernet.space import Diagram, LinearConstraint, SearchSpace, Select
from supernet.spaces.block_cell import (
    LOOSE,
    NUM_INPUTS,
    SIDES,
    USED,
    Add,
    BlockCell,
    Contribution,
    End,
    Entry,
    From,
    Join,
    Nothing,
    outlet_builders,
    reach,
)

ADD, CONCAT = "add", "concat"


class BlockSpace(SearchSpace):
    """Cells of `num_blocks` blocks. A block reads two states, which are the outputs of the two
    cells before and of the blocks before, and makes one more: op1(state1) + op2(state2), or both
    side by side. States that no block reads, the loose ends, are the cell's output.

    A side is one choice: its options are each state with each operation, such as
    "2_sep_conv_3x3". Controllers predict and mutations change inputs and operations one by one
    (`genes`).

    What a loose end costs depends on several choices, as the cells after it bring it to their width
    by a 1x1 convolution. Therefore each state but the last has an implied choice, whether it is
    loose: with these, costs are sums over choices, and exact. The 1x1 convolution of a
    concatenation is computed as the sum of those of its parts, which are measured one by one; the
    concatenation itself is not. The one place where loose ends change no cost is the classifier:
    the last cell has zeros where a used state would be, and the classifier has idle weights there.
    The network is the paper's, but for these. Other than in the official code of NASNet, the first
    cell, too, has a 1x1 convolution for both of its inputs, the stem.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        width: channels of each state of the first cells; reductions double it.
        num_cells: of the network, reductions included; these are at a third and at two thirds:
            3 N + 2 cells are N, a reduction, N, a reduction, N.
        num_blocks: of a cell.
        stem_multiplier: channels of the stem, in widths.
    """

    operations: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]] = ("normal", "reduce")  # of cells: of stride 1, of stride 2
    combinations: ClassVar[tuple[str, ...]] = (ADD,)
    loose_inputs: ClassVar[bool] = False  # whether inputs that no block reads are loose ends, too

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 32,
        width: int = 32,
        num_cells: int = 8,
        num_blocks: int = 5,
        stem_multiplier: int = 3,
    ) -> None:
        for name, value, least in (
            ("width", width, 2),
            ("num_cells", num_cells, 3),
            ("num_blocks", num_blocks, 1),
            ("stem_multiplier", stem_multiplier, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more; got {value}")
        self.width, self.num_cells = width, num_cells
        self.num_blocks, self.stem_multiplier = num_blocks, stem_multiplier
        self.states = range(NUM_INPUTS, NUM_INPUTS + num_blocks)  # that blocks make
        self.loose_ends = {kind: tuple(self._ends(kind)) for kind in self.kinds}
        super().__init__(
            choices=tuple(chain.from_iterable(map(self._choices, self.kinds))),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "width": width,
                "num_cells": num_cells,
                "num_blocks": num_blocks,
                "stem_multiplier": stem_multiplier,
            },
            constraints=tuple(chain.from_iterable(map(self._rules, self.kinds))),
        )

    def _choices(self, kind: str) -> Iterator[Choice]:
        for state in self.states:
            options = tuple(f"{s}_{op}" for s, op in product(range(state), self.operations))
            for side in SIDES:
                yield Choice(f"{kind}_{state}_{side}", options)
            if len(self.combinations) > 1:
                yield Choice(f"{kind}_{state}_combine", self.combinations)
        yield from (end.choice for end in self.loose_ends[kind])

    def _ends(self, kind: str) -> Iterator[End]:
        for state in range(0 if self.loose_inputs else NUM_INPUTS, self.states[-1]):
            later = (s for s in self.states if s > state)
            readers = tuple(f"{kind}_{s}_{side}" for s, side in product(later, SIDES))
            choice = Choice(f"{kind}_{state}_end", (USED, LOOSE), absent=USED, implied=True)
            yield End(state, choice, readers, len(self.operations))

    def _reading(self, end: End, reader: str) -> list[tuple[str, str]]:
        return [(reader, f"{end.state}_{operation}") for operation in self.operations]

    def _rules(self, kind: str) -> Iterator[LinearConstraint]:
        """An end is loose if no side reads it, and only then."""
        for end in self.loose_ends[kind]:
            loose = (end.choice.name, LOOSE)
            pairs = [self._reading(end, reader) for reader in end.readers]
            terms = dict.fromkeys([loose, *chain.from_iterable(pairs)], 1.0)
            yield LinearConstraint(terms, lower=1.0)
            for reading in pairs:
                yield LinearConstraint(dict.fromkeys([loose, *reading], 1.0), upper=1.0)

    def implied(self, options: Mapping[str, str]) -> Mapping[str, str]:
        found = {}
        for end in chain.from_iterable(self.loose_ends.values()):
            read = any(_split(options[reader])[0] == str(end.state) for reader in end.readers)
            found[end.choice.name] = USED if read else LOOSE
        return found

    def scores(self, option_scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is implied counts nothing, unless it is given."""
        given = next(iter(option_scores.values()))
        nothing = {c.name: given.new_zeros(len(c.options)) for c in self.choices if c.implied}
        return {**nothing, **option_scores}

    def shares(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Sides are independent: a state is loose with the product of the probabilities that each
        of them reads another."""
        found = dict(probabilities)
        for end in chain.from_iterable(self.loose_ends.values()):
            first = end.state * end.num_operations
            reading = slice(first, first + end.num_operations)
            others = torch.stack([1 - probabilities[name][reading].sum() for name in end.readers])
            loose = others.prod()
            found[end.choice.name] = torch.stack([1 - loose, loose])
        return {choice.name: found[choice.name] for choice in self.choices}

    @cached_property
    def genes(self) -> tuple[Choice, ...]:
        """Five predictions a block, in the paper's order: both inputs, both operations, and how to
        combine them, where there is a choice."""
        found = list[Choice]()
        for kind, state in product(self.kinds, self.states):
            inputs, name = tuple(map(str, range(state))), f"{kind}_{state}"
            found += [Choice(f"{name}_{side}_input", inputs) for side in SIDES]
            found += [Choice(f"{name}_{side}_operation", self.operations) for side in SIDES]
            if len(self.combinations) > 1:
                found.append(Choice(f"{name}_combine", self.combinations))
        return tuple(found)

    def encode(self, architecture: Architecture) -> dict[str, str]:
        found = {}
        for name, option in architecture:
            if name.endswith(SIDES):
                found[f"{name}_input"], found[f"{name}_operation"] = _split(option)
            else:
                found[name] = option
        return {gene.name: found[gene.name] for gene in self.genes}

    def decode(self, genes: Mapping[str, str]) -> Architecture:
        known = {gene.name: gene for gene in self.genes}
        if unknown := [name for name in genes if name not in known]:
            raise ValueError(
                f"{self.id} has no gene {', '.join(map(repr, unknown))}; valid: {', '.join(known)}"
            )
        if missing := [name for name in known if name not in genes]:
            raise ValueError(f"no option given for gene {', '.join(map(repr, missing))}")
        for name, option in genes.items():
            known[name].index(option)
        return self.architecture(
            {
                c.name: f"{genes[f'{c.name}_input']}_{genes[f'{c.name}_operation']}"
                if c.name.endswith(SIDES)
                else genes[c.name]
                for c in self.decided
            }
        )

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        stem_chs = self.stem_multiplier * self.width
        stem = nn.Sequential(
            nn.Conv2d(self.in_chans, stem_chs, 3, padding=1, bias=False), nn.BatchNorm2d(stem_chs)
        )
        reductions = (self.num_cells // 3, 2 * self.num_cells // 3)
        blocks, read, width = list[Block](), [("", stem_chs)] * NUM_INPUTS, self.width
        strides = [1]  # of the cells so far; before the first there is none
        for index in range(self.num_cells):
            stride = 2 if index in reductions else 1
            kind, width = self.kinds[-1 if stride == 2 else 0], width * stride
            entries = [
                self._entry(select, *source, width, step)
                for source, step in zip(read[-NUM_INPUTS:], (strides[-1], 1), strict=True)
            ]
            cell = self._cell(select, kind, width, stride, entries, index == self.num_cells - 1)
            blocks.append(Block(cell, cell.num_parts * width, stride))
            read.append((kind, width))
            strides.append(stride)
        after = reductions[-1]
        side = math.ceil(math.ceil(self.img_size / 2) / 2)
        return Network(
            stem=stem,
            stem_stride=1,
            blocks=blocks,
            final=nn.ReLU(),
            num_features=blocks[-1].out_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
            num_inputs=NUM_INPUTS,
            auxiliary=Auxiliary(after, partial(AuxiliaryHead, blocks[after].out_chs, side)),
        )

    def _entry(
        self, select: Select, kind: str, in_chs: int, out_chs: int, stride: int
    ) -> nn.Module:
        """From a cell of a kind, or, where that is empty, from the stem."""
        if not kind:
            return ReLUConvBN(in_chs, out_chs, 1)
        build = partial(reach, in_chs, out_chs, stride)
        candidates: Candidates = {USED: Nothing, LOOSE: lambda: Contribution(build())}
        layers = [select(end.choice, candidates) for end in self.loose_ends[kind]]
        return Entry(in_chs, self.loose_ends[kind], layers, build(), out_chs)

    def _cell(
        self,
        select: Select,
        kind: str,
        width: int,
        stride: int,
        entries: list[nn.Module],
        padded: bool,
    ) -> BlockCell:
        blocks, ends = list[dict[str, nn.Module]](), self.loose_ends[kind]
        for state in self.states:
            candidates = self._candidates(state, width, stride)
            block = {
                side: select(self.by_name[f"{kind}_{state}_{side}"], candidates) for side in SIDES
            }
            block["combine"] = Add()
            if (combine := self.by_name.get(f"{kind}_{state}_combine")) is not None:
                both: Candidates = {ADD: Add, CONCAT: partial(Join, width)}
                block["combine"] = select(combine, {name: both[name] for name in combine.options})
            blocks.append(block)
        outlets = [
            select(end.choice, outlet_builders(width, stride if end.state < NUM_INPUTS else 1))
            for end in ends
        ]
        return BlockCell(entries, blocks, ends, outlets, padded)

    def _candidates(self, state: int, width: int, stride: int) -> Candidates:
        """Of a side; what reads an input of a reduction cell has its stride."""
        return {
            f"{source}_{operation}": partial(
                _from, source, operation, width, stride if source < NUM_INPUTS else 1
            )
            for source, operation in product(range(state), self.operations)
        }

    def diagram(self, architecture: Architecture) -> Diagram:
        nodes, edges, options = list[str](), list[tuple[int, int, str]](), dict(architecture)
        for kind in self.kinds:
            start, output = len(nodes), len(nodes) + NUM_INPUTS + self.num_blocks
            nodes += [f"{kind}: input 0", "input 1"]
            for state in self.states:
                concat = options.get(f"{kind}_{state}_combine") == CONCAT
                nodes.append(f"{state} {CONCAT}" if concat else str(state))
                for side in SIDES:
                    source, operation = _split(options[f"{kind}_{state}_{side}"])
                    edges.append((start + int(source), start + state, operation))
            nodes.append("output")
            loose = [e.state for e in self.loose_ends[kind] if options[e.choice.name] == LOOSE]
            edges += [(start + state, output, "") for state in (*loose, self.states[-1])]
        return Diagram(tuple(nodes), tuple(edges))


def _split(option: str) -> tuple[str, str]:
    """State and operation of a side."""
    source, _, operation = option.partition("_")
    return source, operation


def _from(source: int, operation: str, width: int, stride: int) -> nn.Module:
    return From(source, BUILDERS[operation](width, stride))


def identities(operation: str, most_states: int = 100) -> frozenset[str]:
    """The options of sides that hand on a state."""
    return frozenset(f"{state}_{operation}" for state in range(most_states))
