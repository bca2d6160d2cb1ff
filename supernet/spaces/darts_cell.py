"""A cell of DARTS (Liu et al. 2019, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import drop_path
from torch import Tensor, nn

from supernet.joint import add_jointly
from supernet.mixed_ops.base import Searchable, Weights, run_layer
from supernet.ops.darts import Zero
from supernet.spaces.nasbench201 import Sum

NODES = (2, 3, 4, 5)  # 0 and 1 are the inputs
OUTPUT = 6
EDGES = tuple((source, target) for target in NODES for source in range(target))


def incoming(node: int) -> range:
    """The nodes that a node may read."""
    return range(node)


def edge_name(source: int, target: int) -> str:
    return f"edge_{source}_{target}"


class Concat(nn.Module):
    """The output of a cell. A module, so that its latency is measured too."""

    def forward(self, *terms: Tensor) -> Tensor:
        return torch.cat(terms, dim=1)


class Cell(Searchable):
    """Reads the outputs of the two cells before; its own is that of its four nodes, side by side.

    Args:
        entries: bring the two inputs to the cell's width and resolution.
        layers: by (source, target), fixed or searchable; edges that are `none` are left out.
        joint: whether what reads a node is computed together (`supernet.joint`); all edges are
            searchable then.
    """

    def __init__(
        self,
        entries: Sequence[nn.Module],
        layers: Mapping[tuple[int, int], nn.Module],
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.joint = joint
        self.entries = nn.ModuleList(entries)
        kept = {edge for edge in EDGES if not isinstance(layers[edge], Zero)}
        for node in NODES:  # invalid, but it can be built
            if not any(target == node for _, target in kept):
                kept.add((0, node))
        self.edges = nn.ModuleDict({edge_name(*e): layers[e] for e in EDGES if e in kept})
        self.nodes = nn.ModuleList(Sum() for _ in NODES)
        self.output = Concat()
        self.drop_path_rate: float = 0.0

    def forward(self, before: Tensor, last: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, C', H', W'), (N, C'', H, W) -> (N, 4 C, H / stride, W / stride)."""
        states = [entry(x) for entry, x in zip(self.entries, (before, last), strict=True)]
        if self.joint:
            assert weights is not None
            return self.output(*self._jointly(states, weights))
        for node, add in zip(NODES, self.nodes, strict=True):
            names = [(s, edge_name(s, node)) for s in incoming(node)]
            terms = [
                self._run(self.edges[name], states[source], weights)
                for source, name in names
                if name in self.edges
            ]
            total = add(*terms[:2])
            for term in terms[2:]:  # a derived node, which is what is measured, has two
                total = total + term
            states.append(total)
        return self.output(*states[NODES[0] :])

    def _jointly(self, inputs: Sequence[Tensor], weights: Weights) -> list[Tensor]:
        """The states of the nodes."""
        totals: list[Tensor | None] = [*inputs, *[None] * len(NODES)]
        for source in range(NODES[-1]):
            targets = [node for node in NODES if node > source]
            positions: list[Any] = [self.edges[edge_name(source, node)] for node in targets]
            paths = [weights[position.choice.name] for position in positions]
            state = self._state(totals, source)
            totals[targets[0] :] = add_jointly(state, positions, paths, totals[targets[0] :])
        return [self._state(totals, node) for node in NODES]

    def _state(self, totals: Sequence[Tensor | None], node: int) -> Tensor:
        """A node's sum; that of nothing is zero."""
        if (total := totals[node]) is not None:
            return total
        mixed: Any = self.edges[edge_name(0, NODES[0])]
        output: Tensor = mixed.candidates["none"](totals[0])
        return output

    def _run(self, layer: nn.Module, x: Tensor, weights: Weights | None) -> Tensor:
        """An edge; in training, a derived cell drops paths that compute something (section 3.2)."""
        y = run_layer(layer, x, weights)
        if self.drop_path_rate and self.training and not isinstance(layer, nn.Identity):
            y = drop_path(y, self.drop_path_rate, self.training)
        return y
