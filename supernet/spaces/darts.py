"""DARTS (Liu et al. 2019): a normal and a reduction cell of four nodes that keep two edges each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import chain, combinations, product

import torch
from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates, Scalable, are_plain
from supernet.network import Auxiliary, Block, Network
from supernet.ops.darts import (
    AuxiliaryHead,
    DilatedConv,
    FactorizedReduction,
    Pool,
    SeparableConv,
    Zero,
)
from supernet.ops.nasbench201 import ReLUConvBN
from supernet.space import Diagram, LinearConstraint, SearchSpace, Select, Way
from supernet.spaces.darts_cell import EDGES, NODES, OUTPUT, Cell, incoming
from supernet.spaces.genotype import read_genotype, write_genotype

NONE = "none"
OPERATIONS = (
    NONE,
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
KINDS = ("normal", "reduce")
KEPT = 2  # edges of a node
WHICH = ("first", "second")  # of them


def choice_name(kind: str, source: int, target: int) -> str:
    return f"{kind}_{source}_{target}"


class Darts(SearchSpace):
    """14 choices of eight operations for the normal cells, which share them, and 14 for the two
    reduction cells, at a third and at two thirds of the depth.

    Nodes 0 and 1 are the outputs of the two cells before. A valid cell keeps two edges of each of
    the nodes 2 to 5, the others are `none`: (1 * 3 * 6 * 10 * 7^8)^2 = 1.1e18 architectures.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        width: channels of each node of the first cells; reductions double it.
        num_cells: of the network, reductions included: 8 while searching, 20 for retraining.
        stem_multiplier: channels of the stem, in widths.
        pool_norm: whether a batch norm (without scale and shift) follows each pool: so it is in
            the paper's search, but not in its retrained networks.
    """

    skip_options, none_options = frozenset({NONE, "skip_connect"}), frozenset({NONE})
    safeguards = ("normal_*=skip_connect:2",)  # as in P-DARTS

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 32,
        width: int = 16,
        num_cells: int = 8,
        stem_multiplier: int = 3,
        pool_norm: bool = True,
    ) -> None:
        for name, value, least in (
            ("width", width, 2),
            ("num_cells", num_cells, 3),
            ("stem_multiplier", stem_multiplier, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more; got {value}")
        self.width, self.num_cells = width, num_cells
        self.stem_multiplier, self.pool_norm = stem_multiplier, pool_norm
        super().__init__(
            choices=tuple(chain.from_iterable(_inputs(*pair) for pair in product(KINDS, NODES))),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "width": width,
                "num_cells": num_cells,
                "stem_multiplier": stem_multiplier,
                "pool_norm": pool_norm,
            },
            constraints=_two_edges_a_node(),
        )

    @property
    def size(self) -> int:
        """Number of valid architectures."""
        each = len(OPERATIONS) - 1
        cell = math.prod(math.comb(len(incoming(node)), KEPT) * each**KEPT for node in NODES)
        return int(cell ** len(KINDS))

    @property
    def reductions(self) -> tuple[int, int]:
        """Indices of the reduction cells."""
        return self.num_cells // 3, 2 * self.num_cells // 3

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        affine = not search  # as in the official search network
        width, out_chs = self.width, self.stem_multiplier * self.width
        stem = nn.Sequential(
            nn.Conv2d(self.in_chans, out_chs, 3, padding=1, bias=False), nn.BatchNorm2d(out_chs)
        )
        before, blocks = (out_chs, 1), list[Block]()  # channels and stride of the last cell but one
        for index in range(self.num_cells):
            kind, stride = ("reduce", 2) if index in self.reductions else ("normal", 1)
            width *= stride
            layers = {}
            for s, t in EDGES:
                step = stride if s < 2 else 1
                candidates = partial(self._candidates, stride=step, affine=affine)
                choice = self.by_name[choice_name(kind, s, t)]
                layers[s, t] = select(choice, Scalable(candidates, width, step))
            entries = (
                _entry(before[0], width, before[1], affine),
                _entry(out_chs, width, 1, affine),
            )
            before, out_chs = (out_chs, stride), len(NODES) * width
            cell = Cell(entries, layers, joint=search and are_plain(layers))
            blocks.append(Block(cell, out_chs, stride))
        after = self.reductions[-1]
        side = math.ceil(math.ceil(self.img_size / 2) / 2)
        return Network(
            stem=stem,
            stem_stride=1,
            blocks=blocks,
            final=nn.Identity(),
            num_features=out_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
            num_inputs=2,
            auxiliary=Auxiliary(after, partial(AuxiliaryHead, blocks[after].out_chs, side)),
        )

    def _candidates(self, width: int, stride: int, affine: bool) -> Candidates:
        skip = partial(FactorizedReduction, width, width, affine) if stride == 2 else nn.Identity
        builders = (
            partial(Zero, stride),
            *(partial(Pool, width, kind, stride, self.pool_norm) for kind in ("max", "avg")),
            skip,
            *(partial(SeparableConv, width, kernel, stride, affine) for kernel in (3, 5)),
            *(partial(DilatedConv, width, kernel, stride, affine) for kernel in (3, 5)),
        )
        return dict(zip(OPERATIONS, builders, strict=True))

    def scores(self, option_scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is left out counts nothing; what is kept, its log-probability.

        Of the edges of a node the constraints keep two, so that without a budget the best sum is
        the paper's rule (section 2.4): the two edges whose best operation is strongest, with these
        operations. Among equal scores either may be chosen, where the paper takes the first.
        """
        kept = torch.tensor([float(option != NONE) for option in OPERATIONS])
        return {name: score * kept.to(score) for name, score in option_scores.items()}

    def shares(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of valid architectures drawn in proportion to the product of the probabilities of the
        operations that they keep: the distribution whose mode `scores` derives.

        With q_e the probability that edge e is not `none`, a node keeps the edges a and b in
        proportion to q_a q_b, and their operations in proportion to their probabilities.
        """
        found = dict[str, Tensor]()
        first = OPERATIONS.index(NONE) + 1  # `none` is the first option
        for kind, node in product(KINDS, NODES):
            names = [choice_name(kind, source, node) for source in incoming(node)]
            kept = torch.stack([probabilities[name][first:].sum() for name in names])
            pairs = torch.outer(kept, kept) * (1 - torch.eye(len(names)).to(kept))
            ratio = pairs.sum(dim=1) / (pairs.sum() / KEPT).clamp_min(1e-30) / kept.clamp_min(1e-30)
            for name, factor in zip(names, ratio, strict=True):
                operations = factor * probabilities[name][first:]
                found[name] = torch.cat([1 - operations.sum(dim=0, keepdim=True), operations])
        return {name: found[name] for name in probabilities}

    @cached_property
    def genes(self) -> tuple[Choice, ...]:
        """Of each node the two edges that it keeps, by where they come from, and their operations:
        whatever they say is valid."""
        found = []
        for kind, node in product(KINDS, NODES):
            pairs = tuple("+".join(map(str, pair)) for pair in combinations(incoming(node), KEPT))
            found.append(Choice(f"{kind}_{node}_inputs", pairs))
            found += [Choice(f"{kind}_{node}_{which}", OPERATIONS[1:]) for which in WHICH]
        return tuple(found)

    def encode(self, architecture: Architecture) -> dict[str, str]:
        genes = {}
        for kind, node in product(KINDS, NODES):
            edges = {s: architecture[choice_name(kind, s, node)] for s in incoming(node)}
            kept = {source: operation for source, operation in edges.items() if operation != NONE}
            genes[f"{kind}_{node}_inputs"] = "+".join(map(str, kept))
            for which, operation in zip(WHICH, kept.values(), strict=True):
                genes[f"{kind}_{node}_{which}"] = operation
        return genes

    def decode(self, genes: Mapping[str, str]) -> Architecture:
        options = {choice.name: NONE for choice in self.choices}
        for kind, node in product(KINDS, NODES):
            for source, which in zip(genes[f"{kind}_{node}_inputs"].split("+"), WHICH, strict=True):
                options[choice_name(kind, int(source), node)] = genes[f"{kind}_{node}_{which}"]
        return self.architecture(options)

    def ways(self) -> Sequence[Sequence[Way]]:
        """A node is a group: each two of its edges, each with each operation."""
        return _ways(self.excluded)

    def to_string(self, architecture: Architecture) -> str:
        """The official code's form; of a valid architecture alone."""
        cells = {}
        for kind in KINDS:
            genes = [(architecture[choice_name(kind, s, t)], s) for s, t in EDGES]
            cells[kind] = [gene for gene in genes if gene[0] != NONE]
        return write_genotype(cells, range(NODES[0], OUTPUT))

    def from_string(self, text: str) -> Architecture:
        """Read the official code's form.

        Raises:
            ValueError: another form or an unknown operation, or not two edges a node.
        """
        options = {choice.name: NONE for choice in self.choices}
        for kind, genes in read_genotype(text, KINDS, range(NODES[0], OUTPUT)).items():
            if len(genes) != KEPT * len(NODES):
                raise ValueError(
                    f"{kind} of the genotype has {len(genes)} operations; it must have "
                    f"{KEPT} for each of {len(NODES)} nodes"
                )
            for index, (operation, source) in enumerate(genes):
                name = choice_name(kind, source, node := NODES[index // KEPT])
                if source not in incoming(node) or options[name] != NONE:
                    raise ValueError(
                        f"node {node} of {kind} reads node {source} in the genotype; it must read "
                        f"{KEPT} different ones of {', '.join(map(str, incoming(node)))}"
                    )
                if operation == NONE or operation not in OPERATIONS:
                    raise ValueError(
                        f"operation {operation!r} of the genotype is unknown; "
                        f"valid: {', '.join(OPERATIONS[1:])}"
                    )
                options[name] = operation
        return self.architecture(options)

    def diagram(self, architecture: Architecture) -> Diagram:
        nodes, edges = list[str](), list[tuple[int, int, str]]()
        for kind in KINDS:
            start = len(nodes)
            inputs = (f"{kind}: input 0", "input 1")
            nodes += [*inputs, *map(str, NODES), "output"]
            for s, t in EDGES:
                if (operation := architecture[choice_name(kind, s, t)]) != NONE:
                    edges.append((start + s, start + t, operation))
            edges += [(start + node, start + OUTPUT, "") for node in NODES]
        return Diagram(tuple(nodes), tuple(edges))


def _inputs(kind: str, node: int) -> list[Choice]:
    names = tuple(choice_name(kind, source, node) for source in incoming(node))
    into = Choice(f"{kind}_into_{node}", names)
    return [Choice(name, OPERATIONS, absent=NONE, into=into) for name in names]


def _entry(in_chs: int, width: int, stride: int, affine: bool) -> nn.Module:
    """What brings an input of a cell to the cell's width and resolution."""
    if stride == 2:
        return FactorizedReduction(in_chs, width, affine)
    return ReLUConvBN(in_chs, width, 1, affine=affine)


@cache
def _ways(excluded: frozenset[tuple[str, str]]) -> list[list[Way]]:
    groups = []
    for kind, node in product(KINDS, NODES):
        names = [choice_name(kind, source, node) for source in incoming(node)]
        group = []
        for kept in combinations(names, KEPT):
            for operations in product(OPERATIONS[1:], repeat=KEPT):
                options = dict.fromkeys(names, NONE) | dict(zip(kept, operations, strict=True))
                if excluded.isdisjoint(options.items()):
                    group.append(tuple(options.items()))
        groups.append(group)
    return groups


def _two_edges_a_node() -> tuple[LinearConstraint, ...]:
    constraints = []
    for kind, node in product(KINDS, NODES):
        names = (choice_name(kind, source, node) for source in incoming(node))
        terms = dict.fromkeys(chain.from_iterable(product([n], OPERATIONS[1:]) for n in names), 1.0)
        constraints.append(LinearConstraint(terms, lower=KEPT, upper=KEPT))
    return tuple(constraints)
