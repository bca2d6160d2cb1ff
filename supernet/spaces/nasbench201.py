"""NAS-Bench-201 (Dong & Yang 2020): one cell of four nodes and six edges, repeated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain, product
from typing import cast

from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.joint import add_jointly
from supernet.mixed_ops.base import (
    Candidates,
    MixedOp,
    Scalable,
    Searchable,
    Weights,
    are_plain,
    run_layer,
)
from supernet.network import Block, Network
from supernet.ops.nasbench201 import ReLUConvBN, ResidualReduction, Zero
from supernet.space import Diagram, LinearConstraint, SearchSpace, Select
from supernet.spaces.compact_cell import CompactCell, Edge, plan

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NUM_NODES = 4
EDGES = tuple((source, target) for target in range(1, NUM_NODES) for source in range(target))


def edge_name(source: int, target: int) -> str:
    return f"edge_{source}_{target}"


class Sum(nn.Module):
    """A node: the sum of its incoming edges. A module, so that its latency is measured too."""

    def forward(self, *terms: Tensor) -> Tensor:
        output = terms[0]
        for term in terms[1:]:
            output = output + term
        return output


class Cell(Searchable):
    """Node 0 is the input, node 3 the output; every edge carries one operation.

    Args:
        edges: by (source, target), fixed or searchable layers of equal width and resolution.
        joint: whether what reads a node is computed together (`supernet.joint`); all edges are
            plain mixed ops then.
    """

    def __init__(self, edges: dict[Edge, nn.Module], joint: bool = False) -> None:
        super().__init__()
        self.joint = joint
        self.edges = nn.ModuleDict({edge_name(*edge): layer for edge, layer in edges.items()})
        self.nodes = nn.ModuleList(Sum() for _ in range(2, NUM_NODES))
        self.compacted: CompactCell | None = None

    def layers(self) -> dict[Edge, nn.Module]:
        return {edge: self.edges[edge_name(*edge)] for edge in EDGES}

    def compact(self, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        """Leave out what has no effect, share what edges have in common (`CompactCell`).

        Between two cells a ReLU that is all that reads the second one's input belongs to the first.
        """
        layers, rectify_output = self.layers(), False
        if isinstance(after, Cell):
            rectify_output = plan(after.layers()).rectified_input
        rectified_input = isinstance(before, Cell) and plan(layers).rectified_input
        self.compacted = CompactCell(layers, rectified_input, rectify_output)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.compacted is not None:
            output: Tensor = self.compacted(x)
            return output
        if self.joint:
            assert weights is not None
            return self._forward_jointly(x, weights)
        states = {0: x}
        for target in range(1, NUM_NODES):
            terms = [
                run_layer(self.edges[edge_name(source, target)], states[source], weights)
                for source in range(target)
            ]
            states[target] = self.nodes[target - 2](*terms) if target > 1 else terms[0]
        return states[NUM_NODES - 1]

    def _forward_jointly(self, x: Tensor, weights: Weights) -> Tensor:
        totals: list[Tensor | None] = [x, *[None] * (NUM_NODES - 1)]
        for source in range(NUM_NODES - 1):
            state, targets = totals[source], range(source + 1, NUM_NODES)
            if state is None:
                state = x.new_zeros(x.shape)
            names = [edge_name(source, target) for target in targets]
            positions = [cast(MixedOp, self.edges[name]) for name in names]
            paths = [weights[position.choice.name] for position in positions]
            totals[source + 1 :] = add_jointly(state, positions, paths, totals[source + 1 :])
        output = totals[-1]
        return x.new_zeros(x.shape) if output is None else output


class NasBench201(SearchSpace):
    """Six choices of five operations; all cells share them: 5^6 = 15,625 architectures.

    A cell is valid when some path without `none` joins its input to its output: every cut between
    the two must be crossed by an edge that is not `none`. (341 cells are not.)

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        widths: channels of each stage, 16, 32, 64 in the benchmark.
        num_cells: cells a stage, 5 in the benchmark.
    """

    skip_options, none_options = frozenset(OPERATIONS[:2]), frozenset(OPERATIONS[:1])
    safeguards = ("*=none:0", "*=skip_connect:2")

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 32,
        widths: Sequence[int] = (16, 32, 64),
        num_cells: int = 5,
    ) -> None:
        if not widths or num_cells < 1:
            raise ValueError(f"at least one stage and one cell: {widths=}, {num_cells=}")
        self.widths = tuple(widths)
        self.num_cells = num_cells
        super().__init__(
            choices=tuple(chain.from_iterable(map(_inputs, range(1, NUM_NODES)))),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "widths": list(widths),
                "num_cells": num_cells,
            },
            constraints=_connected(),
        )

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        candidates = partial(_candidates, affine=not search)  # as in the benchmark's search
        blocks, in_chs = [], self.widths[0]
        for stage, width in enumerate(self.widths):
            if stage > 0:
                blocks.append(Block(ResidualReduction(in_chs, width), width, 2))
                in_chs = width
            for _ in range(self.num_cells):
                edges = {
                    edge: select(self.by_name[edge_name(*edge)], Scalable(candidates, width))
                    for edge in EDGES
                }
                blocks.append(Block(Cell(edges, joint=search and are_plain(edges)), width, 1))
        stem = nn.Sequential(
            nn.Conv2d(self.in_chans, self.widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(self.widths[0]),
        )
        return Network(
            stem=stem,
            stem_stride=1,
            blocks=blocks,
            final=nn.Sequential(nn.BatchNorm2d(in_chs), nn.ReLU()),
            num_features=in_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
        )

    def to_string(self, architecture: Architecture) -> str:
        """The benchmark's form, `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`."""
        return "+".join(
            "|" + "".join(f"{architecture[edge_name(s, target)]}~{s}|" for s in range(target))
            for target in range(1, NUM_NODES)
        )

    def from_string(self, text: str) -> Architecture:
        """Read the benchmark's form.

        Raises:
            ValueError: another shape, or an unknown operation.
        """
        options = {}
        nodes = text.strip().split("+")
        for target, node in enumerate(nodes, start=1):
            pairs = re.findall(r"([^|~]+)~(\d+)", node)
            written = "|" + "".join(f"{op}~{source}|" for op, source in pairs)
            if written != node or [int(s) for _, s in pairs] != list(range(target)):
                raise ValueError(f"{text!r} is not of the form |op~0|+|op~0|op~1|+|op~0|op~1|op~2|")
            options.update({edge_name(int(s), target): op for op, s in pairs})
        return self.architecture(options)

    def covering(self, num_classes: int) -> Sequence[Network]:
        """A few networks of two cells a stage, with every kind of sum (`CompactCell`)."""
        small = NasBench201(**{**json.loads(self.settings), "num_cells": 2})
        return [
            small.build_network(small.architecture(dict(cell)), num_classes)
            for cell in _covering(self.excluded)
        ]

    def diagram(self, architecture: Architecture) -> Diagram:
        edges = tuple((s, t, architecture[edge_name(s, t)]) for s, t in EDGES)
        return Diagram(("input", "1", "2", "output"), edges)


def _inputs(node: int) -> list[Choice]:
    names = tuple(edge_name(source, node) for source in range(node))
    into = Choice(f"into_{node}", names)
    return [Choice(name, OPERATIONS, into=into) for name in names]


@cache
def _covering(excluded: frozenset[tuple[str, str]]) -> list[tuple[tuple[str, str], ...]]:
    """Of all valid cells each one with a kind of sum that is not seen yet: pairs of edge and op."""
    layers = {name: build() for name, build in _candidates(1, affine=False).items()}
    constraints = _connected()
    seen: set[object] = set()
    found = []
    for ops in product(OPERATIONS, repeat=len(EDGES)):
        cell = tuple((edge_name(*edge), op) for edge, op in zip(EDGES, ops, strict=True))
        if not excluded.isdisjoint(cell) or not all(rule.holds(cell) for rule in constraints):
            continue
        own = {edge: layers[op] for edge, op in zip(EDGES, ops, strict=True)}
        last = plan(own)
        plans = [last, plan(own, rectify_output=True)] if last.rectified_input else [last]
        kinds = {step.kind for one in plans for step in one.steps}
        if not kinds <= seen:
            seen |= kinds
            found.append(cell)
    return found


def _candidates(width: int, affine: bool) -> Candidates:
    pool = partial(nn.AvgPool2d, 3, stride=1, padding=1, count_include_pad=False)
    builders = (
        Zero,
        nn.Identity,
        partial(ReLUConvBN, width, width, 1, affine=affine),
        partial(ReLUConvBN, width, width, 3, affine=affine),
        pool,
    )
    return dict(zip(OPERATIONS, builders, strict=True))


def _connected() -> tuple[LinearConstraint, ...]:
    """One constraint a cut: node 0 on one side, node 3 on the other, 1 and 2 on either."""
    constraints = []
    for side in ({0}, {0, 1}, {0, 2}, {0, 1, 2}):
        crossing = [(s, t) for s, t in EDGES if s in side and t not in side]
        terms = {(edge_name(s, t), op): 1.0 for s, t in crossing for op in OPERATIONS[1:]}
        constraints.append(LinearConstraint(terms, lower=1.0))
    return tuple(constraints)
