"""A derived NAS-Bench-201 cell as a compiling runtime runs it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supernet.mixed_ops.base import Parts
from supernet.ops.nasbench201 import ReLUConvBN, Zero

Edge = tuple[int, int]  # source and target node
Layers = Mapping[Edge, nn.Module]
INPUT = 0


@dataclass(frozen=True)
class Step:
    """One sum that is computed: that of a node, and of what only this node adds to its own.

    Attributes:
        target: the node.
        plain: nodes that are added as they are.
        pooled: nodes that are added pooled.
        convs: edges whose convolutions are added, small kernels first.
        kernels: sides of their kernels.
        constant: edges whose output is the same for every image and at every place.
        rectified: whether nothing but ReLUs reads the sum.
    """

    target: int
    plain: tuple[int, ...]
    pooled: tuple[int, ...]
    convs: tuple[Edge, ...]
    kernels: tuple[int, ...]
    constant: tuple[Edge, ...]
    rectified: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for steps that compute alike."""
        shifted = bool(self.constant) and not self.convs
        return len(self.plain) + len(self.pooled), self.kernels, shifted, self.rectified


@dataclass(frozen=True)
class Plan:
    """What is left of a cell.

    Attributes:
        steps: in order.
        same: for each node that one of the steps or the input computes, which one; a node that is
            reached by one skip alone is the node it comes from.
        constant: for each other node that is not zero, the edges that it is the sum of.
        output: the last node.
        rectified_input: whether nothing but ReLUs reads the cell's input.
    """

    steps: tuple[Step, ...]
    same: Mapping[int, int]
    constant: Mapping[int, tuple[Edge, ...]]
    output: int
    rectified_input: bool


def plan(layers: Layers, rectify_output: bool = False) -> Plan:
    """Leave out what does not reach the output, is zero or a constant, or is computed already.

    Args:
        rectify_output: whether nothing but ReLUs reads the cell's output.
    """
    live, output = _live(layers), max(target for _, target in layers)
    same, constant = {INPUT: INPUT}, dict[int, tuple[Edge, ...]]()
    sums: dict[int, list[Edge]] = {}
    for target in sorted({target for _, target in live}):
        edges = [edge for edge in live if edge[1] == target]
        if all(_is_constant(layers[edge], edge[0], same, constant) for edge in edges):
            constant[target] = tuple(edges)
        elif len(edges) == 1 and isinstance(layers[edges[0]], nn.Identity):
            same[target] = same[edges[0][0]]
        else:
            same[target], sums[target] = target, edges
    steps = {target: _step(target, edges, layers, same, constant) for target, edges in sums.items()}
    for target in list(steps):
        added_by = [other for other in steps.values() for node in other.plain if node == target]
        if len(added_by) == 1 and same.get(output) != target and not _is_read(target, steps, same):
            steps[added_by[0].target] = _merged(steps[target], added_by[0], layers)
            del steps[target]
    computed = [INPUT, *steps]
    plainly = {node for step in steps.values() for node in (*step.plain, *step.pooled)}
    if not rectify_output:
        plainly.add(same.get(output, output))
    rectified = {node for node in computed if node not in plainly}
    return Plan(
        tuple(
            Step(**{**vars(step), "rectified": step.target in rectified}) for step in steps.values()
        ),
        same,
        constant,
        output,
        INPUT in rectified,
    )


def _step(
    target: int,
    edges: Iterable[Edge],
    layers: Layers,
    same: Mapping[int, int],
    constant: Mapping[int, object],
) -> Step:
    """The sum of a node, as it stands in the whole cell."""
    plain, pooled = list[int](), list[int]()
    convs, constants = list[Edge](), list[Edge]()
    for edge in edges:
        layer = layers[edge]
        if _is_constant(layer, edge[0], same, constant):
            constants.append(edge)
        elif isinstance(layer, ReLUConvBN):
            convs.append(edge)
        else:
            (plain if isinstance(layer, nn.Identity) else pooled).append(same[edge[0]])
    return _sorted(
        Step(target, tuple(plain), tuple(pooled), tuple(convs), (), tuple(constants), False), layers
    )


def _merged(inner: Step, outer: Step, layers: Layers) -> Step:
    """The outer sum with the terms of the inner one in its place."""
    plain = [node for node in outer.plain if node != inner.target]
    return _sorted(
        Step(
            outer.target,
            (*inner.plain, *plain),
            inner.pooled + outer.pooled,
            inner.convs + outer.convs,
            (),
            inner.constant + outer.constant,
            False,
        ),
        layers,
    )


def _sorted(step: Step, layers: Layers) -> Step:
    convs = tuple(sorted(step.convs, key=lambda edge: _kernel(layers[edge])))
    kernels = tuple(_kernel(layers[edge]) for edge in convs)
    return Step(**{**vars(step), "convs": convs, "kernels": kernels})


def _is_read(node: int, steps: Mapping[int, Step], same: Mapping[int, int]) -> bool:
    """Whether anything but an addition reads it."""
    return any(
        node in step.pooled or node in [same.get(source) for source, _ in step.convs]
        for step in steps.values()
    )


def _is_constant(
    layer: nn.Module, source: int, same: Mapping[int, int], constant: Mapping[int, object]
) -> bool:
    """Whether the output is the same at every place: a kernel sees where a constant ends."""
    if source in same:
        return False
    return source not in constant or not isinstance(layer, ReLUConvBN) or _kernel(layer) == 1


def _kernel(layer: nn.Module) -> int:
    assert isinstance(layer, ReLUConvBN)
    return layer.kernel_size


def _live(layers: Layers) -> list[Edge]:
    """The edges that reach the output with anything but zeros, sorted by target.

    A node without such an edge is zero, and so is what pools and skips make of it; a batch norm
    makes a constant of it, which counts.
    """
    kept: list[Edge] = []
    carrying, wanted = {INPUT}, {max(target for _, target in layers)}
    for source, target in sorted(layers, key=lambda edge: (edge[1], edge[0])):
        layer = layers[source, target]
        from_zero = source not in carrying and not isinstance(layer, ReLUConvBN)
        if not from_zero and not isinstance(layer, Zero):
            kept.append((source, target))
            carrying.add(target)
    for source, target in reversed(kept):
        if target in wanted:
            wanted.add(source)
    return [(source, target) for source, target in kept if target in wanted]


class FusedSum(nn.Module):
    """The sum of tensors, of convolutions and of a constant, and a ReLU behind it.

    One module, because runtimes fuse it: behind a convolution, additions and a ReLU cost next to
    nothing.

    Args:
        convs: convolutions with their batch norms.
        num_plain: number of tensors that are added as they are.
        shift: constant, (1, C, 1, 1), that no convolution has taken in.
        rectified: whether there is a ReLU.
    """

    def __init__(
        self, convs: Iterable[nn.Module], num_plain: int, shift: Tensor | None, rectified: bool
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.num_plain = num_plain
        self.rectified = rectified
        # as a norm, for which a runtime need not leave its layout
        self.shift = nn.Identity() if shift is None else _norm(shift)

    def forward(self, *inputs: Tensor) -> Tensor:
        """First the plain terms, then an input for each convolution; (N, C, H, W) all of them."""
        terms = list(inputs[: self.num_plain])
        terms += [conv(x) for conv, x in zip(self.convs, inputs[self.num_plain :], strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        output: Tensor = self.shift(total)
        return output.relu() if self.rectified else output


class CompactCell(Parts):
    """Computes what a cell in evaluation mode computes, nothing in vain and nothing twice.

    Args:
        layers: the fixed layers of the cell; they are shared, not copied.
        rectified_input: the cell is given its input behind a ReLU (it may be where the plan says
            that nothing else reads it).
        rectify_output: give the output behind a ReLU.
    """

    def __init__(self, layers: Layers, rectified_input: bool, rectify_output: bool) -> None:
        super().__init__()
        self.plan = plan(layers, rectify_output)
        self.rectify_output = rectify_output
        self.rectified = {step.target for step in self.plan.steps if step.rectified}
        if rectified_input:
            self.rectified.add(INPUT)
        self.relu = nn.ReLU()
        self.pool = next((x for x in layers.values() if isinstance(x, nn.AvgPool2d)), None)
        self.sums = nn.ModuleDict()
        for step in self.plan.steps:
            convs = [_conv(layers[edge]) for edge in step.convs]
            shift = self._total(step.constant, layers) if step.constant else None
            if shift is not None and convs:
                convs[-1], shift = _shifted(convs[-1], shift), None
            num_plain = len(step.plain) + len(step.pooled)
            self.sums[str(step.target)] = FusedSum(convs, num_plain, shift, step.rectified)
        for node, edges in self.plan.constant.items():
            self.register_buffer(f"constant_{node}", self._total(edges, layers))

    def _total(self, edges: Iterable[Edge], layers: Layers) -> Tensor:
        """Sum of what these edges make of constants, (1, C, 1, 1)."""
        terms = []
        for edge in edges:
            before = self.plan.constant.get(edge[0])
            if before is not None:
                x = self._total(before, layers)
            else:
                conv = next(layer for layer in layers.values() if isinstance(layer, ReLUConvBN))
                x = next(conv.parameters()).new_zeros(1, conv.out_chs, 1, 1)
            with torch.no_grad():
                terms.append(copy.deepcopy(layers[edge]).eval()(x))
        return torch.stack(terms).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        states = {INPUT: x}
        relus: dict[int, Tensor] = {}
        pools: dict[int, Tensor] = {}
        for step in self.plan.steps:
            terms = [states[node] for node in step.plain]
            for node in step.pooled:
                if node not in pools:
                    assert self.pool is not None
                    pools[node] = self.pool(states[node])
                terms.append(pools[node])
            for source, _ in step.convs:
                node = self.plan.same.get(source, source)
                if node not in relus:
                    relus[node] = self._relu(node, states, x)
                terms.append(relus[node])
            states[step.target] = self.sums[str(step.target)](*terms)
        node = self.plan.same.get(self.plan.output, self.plan.output)
        if self.rectify_output:
            return self._relu(node, states, x)
        return states[node] if node in states else self._constant(node, x)

    def _relu(self, node: int, states: Mapping[int, Tensor], x: Tensor) -> Tensor:
        """A node behind a ReLU, its own or another."""
        if node not in states:
            return self._constant(node, x).relu()
        output: Tensor = states[node] if node in self.rectified else self.relu(states[node])
        return output

    def _constant(self, node: int, x: Tensor) -> Tensor:
        """A node without a step, in the shape of the others."""
        if node not in self.plan.constant:
            return x.new_zeros(x.shape)
        constant: Tensor = self.get_buffer(f"constant_{node}")
        return constant.to(x.dtype).expand(x.shape)


def _conv(layer: nn.Module) -> nn.Sequential:
    assert isinstance(layer, ReLUConvBN)
    return layer.conv


def _shifted(conv: nn.Sequential, shift: Tensor) -> nn.Sequential:
    """A copy of a convolution with its batch norm that adds a constant to the output."""
    conv = copy.deepcopy(conv)
    norm = conv[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.add_(shift.flatten())
    return conv


def _norm(shift: Tensor) -> nn.BatchNorm2d:
    """Adds a constant, (1, C, 1, 1)."""
    norm = nn.BatchNorm2d(shift.shape[1], eps=0.0).to(shift).eval()
    with torch.no_grad():
        norm.bias.copy_(shift.flatten())
    return norm
