"""The operations of a live supernet: what runs where, with which shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latency.recipe import recipe
from latency.table import OpKey
from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates, MixedOp, Parts, PathWeights, Searchable, compact
from supernet.network import Network
from supernet.space import SearchSpace

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """One place where an operation runs in a forward pass.

    Attributes:
        key: what identifies its measurement; sites with equal keys share one.
        choice, option: what the operation is a candidate of; None where it always runs.
        module: the live module.
        input_shapes: of its tensors, batch included.
        output_shape: of its (first) output.
        macs: multiply-accumulates an image: convolutions and matrix products.
        params: number of parameters not already counted for the same option (or, fixed, at all).
        constant: whether it reads nothing that depends on the image.
    """

    key: OpKey
    choice: str | None
    option: str | None
    module: nn.Module
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    macs: int
    params: int
    constant: bool = False


def trace(
    supernet: Network, choices: Sequence[Choice], input_shape: tuple[int, int, int, int]
) -> list[Site]:
    """List the operations of a supernet, in the order of one evaluation pass with all candidates.

    A site is a candidate of a `MixedOp` (or each child of one that is `Parts`), or a module that is
    called, holds nothing searchable and is not part of another such module. What a `Searchable`
    computes outside its submodules is not seen. The network is left as it was.

    Args:
        supernet: to cost deployed networks, built in the form they are deployed in
            (`space.build(MixedOp, num_classes, search=False)`).
        choices: of its space.
        input_shape: (batch, in_chs, height, width).

    Raises:
        ValueError: a site is called with anything but tensors as positional arguments.
    """
    modes = {module: module.training for module in supernet.modules()}
    trained = {parameter: parameter.requires_grad for parameter in supernet.parameters()}
    weights = {choice.name: PathWeights(tuple(range(len(choice.options)))) for choice in choices}
    reference = next(supernet.parameters())
    x = torch.zeros(input_shape, device=reference.device, dtype=reference.dtype)
    x.requires_grad_()  # alone: what needs a gradient depends on the image
    recorder = _Recorder(input_shape[0])
    try:
        for child in supernet.children():
            for module, choice, option in _units(child):
                recorder.attach(module, choice, option)
        supernet.eval().requires_grad_(False)
        with torch.enable_grad(), recorder.counter:
            supernet(x, weights)
    finally:
        recorder.detach()
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
    return recorder.sites


def trace_architecture(
    space: SearchSpace,
    architecture: Architecture,
    num_classes: int,
    input_shape: tuple[int, int, int, int],
    compiled: bool = False,
) -> list[Site]:
    """The operations that one derived network runs, cut up as `trace` cuts up the supernet.

    Where an option makes others idle (a `none` in a cell) these are fewer than the supernet's
    sites of the same options.

    Args:
        compiled: for a runtime that compiles the graph: without what does not depend on the image
            or does not matter (`Searchable.compact`).
    """

    def only(choice: Choice, candidates: Candidates) -> nn.Module:
        return candidates[architecture[choice.name]]()

    network = space.build(only, num_classes, search=False)
    return _compiled(network, input_shape) if compiled else trace(network, (), input_shape)


def trace_compiled(
    space: SearchSpace, num_classes: int, input_shape: tuple[int, int, int, int]
) -> list[Site]:
    """What compiled networks of the space run, each distinct operation once (`space.covering`)."""
    found: dict[OpKey, Site] = {}
    for network in space.covering(num_classes):
        for site in _compiled(network, input_shape):
            found.setdefault(site.key, site)
    return list(found.values())


def _compiled(network: Network, input_shape: tuple[int, int, int, int]) -> list[Site]:
    compact(network)
    return [site for site in trace(network, (), input_shape) if not site.constant]


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, str | None, str | None]]:
    """Modules that may be a site, each before what it contains, with their choice and option."""
    if isinstance(module, MixedOp):
        for option, candidate in module.candidates.items():
            yield from ((part, module.choice.name, option) for part in _parts(candidate))
        return
    searchable = any(isinstance(part, Searchable) for part in module.modules())
    if not searchable and not isinstance(module, Parts):
        yield module, None, None
    for child in module.children():
        yield from _units(child)


def _parts(candidate: nn.Module) -> Iterator[nn.Module]:
    """What a candidate is measured as; parts may have parts."""
    if not isinstance(candidate, Parts):
        yield candidate
        return
    for child in candidate.children():
        yield from _parts(child)


class _Recorder:
    """Forward hooks that append a site for every outermost call of an attached module."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.sites: list[Site] = []
        self.counter = FlopCounterMode(display=False)
        self._running: nn.Module | None = None
        self._flops_before = 0
        self._counted: dict[tuple[str | None, str | None], set[nn.Parameter]] = {}
        self._attached: set[nn.Module] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, module: nn.Module, choice: str | None, option: str | None) -> None:
        if module in self._attached:  # one module at several places
            return
        self._attached.add(module)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._running is None:
                self._running = module
                self._flops_before = self.counter.get_total_flops()

        def leave(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._running is module:
                self._running = None
                self.sites.append(self._site(module, choice, option, args, kwargs, output))

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _site(
        self,
        module: nn.Module,
        choice: str | None,
        option: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Site:
        if kwargs or not args or not all(isinstance(arg, Tensor) for arg in args):
            raise ValueError(
                f"{type(module).__qualname__} cannot be measured on its own: it is called with "
                f"{[type(arg).__name__ for arg in (*args, *kwargs.values())]}; call it with "
                "tensors as positional arguments"
            )
        shapes = tuple(tuple(arg.shape) for arg in args)
        first = output[0] if isinstance(output, tuple | list) else output
        counted = self._counted.setdefault((choice, option), set())
        new = set(module.parameters()) - counted
        counted |= new
        flops = self.counter.get_total_flops() - self._flops_before
        return Site(
            key=_key(module, shapes, tuple(first.shape), self.batch),
            choice=choice,
            option=option,
            module=module,
            input_shapes=shapes,
            output_shape=tuple(first.shape),
            macs=flops // 2 // self.batch,
            params=sum(parameter.numel() for parameter in new),
            constant=not any(arg.requires_grad for arg in args),
        )


def _key(module: nn.Module, inputs: tuple[Shape, ...], output: Shape, batch: int) -> OpKey:
    """Shapes that the key's numbers cannot tell are part of the operation's text."""
    op, shape = recipe(module), inputs[0]
    image, vector = len(shape) == 4 and shape[2] == shape[3], len(shape) == 2
    if len(inputs) > 1 or shape[0] != batch or not (image or vector):
        op += " on " + " ".join("x".join(map(str, other)) for other in inputs)
    resolution = shape[-1] if len(shape) > 2 else 1
    out_resolution = output[-1] if len(output) > 2 else 1
    return OpKey(
        op=op,
        in_chs=shape[1] if len(shape) > 1 else 1,
        out_chs=output[1] if len(output) > 1 else 1,
        stride=max(1, round(resolution / out_resolution)),
        resolution=resolution,
    )
