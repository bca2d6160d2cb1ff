"""A space's diagram of an architecture, laid out for the report: a chain or graphs with arcs."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter

from supernet.choice import Architecture
from supernet.space import Diagram, SearchSpace

NUM_COLOURS = 7  # of the page's categorical palette
PLAIN = {"none": "absent", "zero": "absent", "skip": "skip", "identity": "skip"}  # by first word

_NODE_HEIGHT, _LEVEL_HEIGHT, _PORT, _CHAR, _MARGIN = 38, 46, 14, 8.2, 16  # px


@dataclass(frozen=True)
class Item:
    """A box of a chain, or an entry of a legend.

    Attributes:
        label: what it says.
        kind: CSS class: "fixed"; "absent", nothing passes; "skip", nothing is computed; or a
            colour, "c1" to "c7".
        detail: second line of a box, smaller.
    """

    label: str
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Arc:
    """An edge of a graph: an SVG path, which is moved `down`, and its label's centre (px)."""

    path: str
    item: Item
    x: float
    y: float
    down: float = 0

    @property
    def text(self) -> str:
        return f"{self.item.label} {self.item.detail}".strip()

    @property
    def width(self) -> float:
        return len(self.text) * _CHAR + 8


@dataclass(frozen=True)
class Box:
    """A node of a graph (px)."""

    label: str
    x: float
    y: float
    width: float
    height: float = _NODE_HEIGHT


@dataclass(frozen=True)
class Drawing:
    """What the template draws: `chain`, or `boxes` and `arcs` within `width` x `height` px."""

    legend: tuple[Item, ...]
    chain: tuple[Item, ...] = ()
    boxes: tuple[Box, ...] = ()
    arcs: tuple[Arc, ...] = ()
    width: float = 0
    height: float = 0


def draw(space: SearchSpace, architecture: Architecture) -> Drawing:
    """Lay out an architecture: chains as a row of boxes to be wrapped, the rest as a graph.

    Colours stand for kinds: the label without its numbers, "k3 e6" for "k3 e6 40 /2". What is
    the same in every architecture of the space is "fixed", and grey.
    """
    diagram = space.diagram(architecture)
    others = [space.diagram(variant) for variant in _variants(space)]
    labels = [_labels(other) for other in others]
    fixed = set(_labels(diagram)).intersection(*labels) if len(space.choices) else set()
    kinds = sorted({_kind(label) for found in labels for label in found if label not in fixed})
    colours = _colours(kinds)

    def item(label: str) -> Item:
        kind = _kind(label)
        style = "fixed" if label in fixed else colours.get(kind, "fixed")
        detail = label.removeprefix(kind).strip()
        return Item(kind if label.startswith(kind) else label, style, detail)

    used = {_kind(label) for label in _labels(diagram) if label not in fixed}
    legend = tuple(Item(kind, colours[kind]) for kind in kinds if kind in used)
    if _is_chain(diagram):
        return Drawing(legend, chain=tuple(item(label) for label in diagram.nodes))
    items = {label: item(label) for _, _, label in diagram.edges}
    return _stack([_graph(part, legend, items) for part in _parts(diagram)])


def _variants(space: SearchSpace) -> list[Architecture]:
    """Architectures that together use every option of every choice."""
    most = max((len(choice.options) for choice in space.choices), default=0)
    return [
        space.architecture({c.name: c.options[i % len(c.options)] for c in space.choices})
        for i in range(most)
    ]


def _is_chain(diagram: Diagram) -> bool:
    return all(edge == (i, i + 1, "") for i, edge in enumerate(diagram.edges))


def _labels(diagram: Diagram) -> list[str]:
    """What has a colour: the nodes of a chain, the edges of any other graph."""
    if _is_chain(diagram):
        return list(diagram.nodes)
    return [label for _, _, label in diagram.edges]


def _kind(label: str) -> str:
    """The words before the first bare number or stride: "k3 e6" of "k3 e6 40 /2"."""
    return re.split(r"\s+/?\d+\b", label, maxsplit=1)[0]


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """CSS class of each kind: a colour of the palette, unless it computes nothing."""
    plain = {kind: PLAIN.get(re.split(r"[_\W]", kind.lower())[0]) for kind in kinds}
    palette = (f"c{i % NUM_COLOURS + 1}" for i in itertools.count())
    return {kind: plain[kind] or next(palette) for kind in kinds}


def _parts(diagram: Diagram) -> list[Diagram]:
    """The parts of a graph that no edge joins, in the order of their first nodes."""
    part = list(range(len(diagram.nodes)))  # by node, the first node of its part
    for source, target, _ in diagram.edges:
        joined = {part[source], part[target]}
        part = [min(joined) if first in joined else first for first in part]
    found = []
    for first in sorted(set(part)):
        nodes = [node for node in range(len(part)) if part[node] == first]
        edges = ((s, t, label) for s, t, label in diagram.edges if part[s] == first)
        renumbered = tuple((nodes.index(s), nodes.index(t), label) for s, t, label in edges)
        found.append(Diagram(tuple(diagram.nodes[node] for node in nodes), renumbered))
    return found


def _stack(drawings: Sequence[Drawing]) -> Drawing:
    """Graphs one below the other."""
    boxes, arcs, height = list[Box](), list[Arc](), 0.0
    for drawing in drawings:
        boxes += [replace(box, y=box.y + height) for box in drawing.boxes]
        arcs += [replace(arc, y=arc.y + height, down=height) for arc in drawing.arcs]
        height += drawing.height
    width = max(drawing.width for drawing in drawings)
    return replace(drawings[0], boxes=tuple(boxes), arcs=tuple(arcs), width=width, height=height)


def _graph(diagram: Diagram, legend: tuple[Item, ...], items: dict[str, Item]) -> Drawing:
    """Nodes on a line; an edge to the next node is straight, any other an arc above or below."""
    place = _topological(diagram)
    edges = sorted(
        ((place[s], place[t], label, i) for i, (s, t, label) in enumerate(diagram.edges)),
        key=lambda edge: (edge[1] - edge[0], edge),
    )
    repeats = Counter(edge[:2] for edge in edges)
    straight = [e for e in edges if e[1] == e[0] + 1 and repeats[e[:2]] == 1]
    levels = _levels([e for e in edges if e not in straight])
    names = [diagram.nodes[i] for i in sorted(place, key=place.__getitem__)]
    ports = {i: _ports(i, levels) for i in range(len(names))}
    widths = [
        max(_text_width(name), _PORT * (1 + max(len(side) for side in ports[i].values())), 56)
        for i, name in enumerate(names)
    ]
    gap = max((_text_width(edge[2]) for edge in straight), default=40) + 24
    lefts = [_MARGIN + sum(widths[:i]) + gap * i for i in range(len(names))]
    above = max((level for (side, level) in levels.values() if side < 0), default=0)
    below = max((level for (side, level) in levels.values() if side > 0), default=0)
    top = _MARGIN + above * _LEVEL_HEIGHT
    middle = top + _NODE_HEIGHT / 2

    arcs = []
    for source, target, label, _ in straight:
        start, end = lefts[source] + widths[source], lefts[target]
        path = f"M{start:g} {middle:g}H{end:g}"
        arcs.append(Arc(path, items[label], (start + end) / 2 - 3, middle))
    for edge, (side, level) in levels.items():
        x1, x2 = (
            lefts[node]
            + widths[node] * (ports[node][side].index(edge) + 1) / (len(ports[node][side]) + 1)
            for node in edge[:2]
        )
        base = top if side < 0 else top + _NODE_HEIGHT
        y = base + side * level * _LEVEL_HEIGHT - side * 14
        bend = f"Q{x1:g} {y:g} {x1 + 12:g} {y:g}H{x2 - 12:g}Q{x2:g} {y:g} {x2:g} {y - side * 12:g}"
        path = f"M{x1:g} {base:g}V{y - side * 12:g}{bend}V{base:g}"
        arcs.append(Arc(path, items[edge[2]], (x1 + x2) / 2, y))
    boxes = (Box(n, x, top, w) for n, x, w in zip(names, lefts, widths, strict=True))
    return Drawing(
        legend,
        boxes=tuple(boxes),
        arcs=tuple(arcs),
        width=lefts[-1] + widths[-1] + _MARGIN,
        height=top + _NODE_HEIGHT + below * _LEVEL_HEIGHT + _MARGIN,
    )


Edge = tuple[int, int, str, int]  # source, target, label, number: two may be alike otherwise


def _levels(edges: list[Edge]) -> dict[Edge, tuple[int, int]]:
    """Side (-1 above, 1 below) and height of each arc, short ones first: arcs of one height never
    overlap, and arcs cross only where both sides would cross."""
    placed: dict[Edge, tuple[int, int]] = {}
    for edge in edges:
        options = []
        for side in (-1, 1):
            here = [e for e, (other, _) in placed.items() if other == side]
            rivals = [e for e in here if e[0] < edge[1] and edge[0] < e[1]]
            crossings = sum(not (edge[0] <= e[0] and e[1] <= edge[1]) for e in rivals)
            level = 1 + max((placed[e][1] for e in rivals), default=0)
            options.append((crossings, level, side))
        _, level, side = min(options)
        placed[edge] = side, level
    return placed


def _ports(node: int, levels: dict[Edge, tuple[int, int]]) -> dict[int, list[Edge]]:
    """Arcs at a node from left to right, by side, in the order in which they don't cross."""
    ports: dict[int, list[Edge]] = {}
    for side in (-1, 1):
        here = {edge: level for edge, (s, level) in levels.items() if s == side}
        arriving = sorted((e for e in here if e[1] == node), key=lambda e: here[e])
        leaving = sorted((e for e in here if e[0] == node), key=lambda e: -here[e])
        ports[side] = [*arriving, *leaving]
    return ports


def _topological(diagram: Diagram) -> dict[int, int]:
    """Position of each node on the line: after all its predecessors, else in the given order."""
    sorter = TopologicalSorter({node: set[int]() for node in range(len(diagram.nodes))})
    for source, target, _ in diagram.edges:
        sorter.add(target, source)
    sorter.prepare()
    order: list[int] = []
    ready: list[int] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])
        node = ready.pop(0)
        order.append(node)
        sorter.done(node)
    return {node: position for position, node in enumerate(order)}


def _text_width(text: str) -> float:
    return len(text) * _CHAR + 20
