"""The macro space of ENAS (Pham et al. 2018, section 2.3): a chain of layers with skips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates, MixedOp, Searchable, Weights, run_layer
from supernet.network import Block, Network
from supernet.ops.darts import Zero
from supernet.ops.enas import FactorizedReduction, Join, conv_branch, pool_branch
from supernet.space import Diagram, SearchSpace, Select

OPERATIONS = (  # in the order of the official code's numbers
    "conv_3x3",
    "sep_conv_3x3",
    "conv_5x5",
    "sep_conv_5x5",
    "avg_pool_3x3",
    "max_pool_3x3",
)
CUT, JOIN = SKIPS = ("cut", "join")


def layer_name(layer: int) -> str:
    return f"layer_{layer}"


def skip_name(source: int, layer: int) -> str:
    return f"skip_{source}_{layer}"


class Layer(Searchable):
    """An operation on the layer before, to which earlier states are added; then batch norm, except
    in the first layer, which has nothing to add.

    Args:
        chs: channels of all states.
        operation: fixed or searchable.
        before: place of the layer before among what it is called with.
        skips: by the place of an earlier state, fixed or searchable; what is cut is left out.
    """

    def __init__(
        self, chs: int, operation: nn.Module, before: int, skips: Mapping[int, nn.Module]
    ) -> None:
        super().__init__()
        self.before, self.operation = before, operation
        kept = {place: skip for place, skip in skips.items() if _carries(skip)}
        self.places = tuple(kept)
        self.skips = nn.ModuleList(kept.values())
        self.norm = nn.BatchNorm2d(chs) if skips else nn.Identity()

    def forward(self, *inputs: Any) -> Tensor:
        """The states, each (N, C, H, W), and weights -> (N, C, H, W)."""
        *states, weights = inputs
        total = run_layer(self.operation, states[self.before], weights)
        for place, skip in zip(self.places, self.skips, strict=True):
            if not _is_cut(skip, weights):
                total = _adder(skip)(total, run_layer(skip, states[place], weights))
        output: Tensor = self.norm(total)
        return output


def _is_cut(skip: nn.Module, weights: Weights | None) -> bool:
    """Whether a searchable skip carries nothing in this pass."""
    if not isinstance(skip, MixedOp):
        return False
    assert weights is not None
    return weights[skip.choice.name].active == (SKIPS.index(CUT),)


def _adder(skip: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    join = skip.candidates[JOIN] if isinstance(skip, MixedOp) else skip
    return join.add if isinstance(join, Join) else torch.add


class Reduction(Searchable):
    """Brings one state down; the official code does so with all of them.

    Args:
        place: of the state among what it is called with.
        read: whether anything reads what it makes; if not, compiled networks leave it out.
    """

    def __init__(self, in_chs: int, out_chs: int, place: int, read: bool) -> None:
        super().__init__()
        self.place, self.read, self.idle = place, read, False
        self.reduce = FactorizedReduction(in_chs, out_chs)

    def compact(self, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        self.idle = not self.read

    def forward(self, *inputs: Any) -> Tensor:
        """The states, of which one is (N, C, H, W), and weights -> (N, C', H / 2, W / 2)."""
        *states, _ = inputs
        state: Tensor = states[self.place]
        return state if self.idle else self.reduce(state)


class ENASMacro(SearchSpace):
    """An operation for each layer, and for each earlier state but that of the layer before, which
    it reads anyway, whether it is added: 6^12 * 2^(12 * 11 / 2) = 1.6e29 architectures.

    State 0 is the stem's, state k that of layer k. In the official code's search, which this is,
    states are added; for its final networks the code concatenates them and adds 1x1 convolutions.
    After a third and two thirds of the layers all states are brought down.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        width: channels of the states, 36 in the official search.
        num_layers: 12 in the paper.
        widening: what a reduction multiplies the width by: 1 in the official search, 2 in its
            final networks.
    """

    skip_options = none_options = frozenset({CUT})

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 32,
        width: int = 36,
        num_layers: int = 12,
        widening: int = 1,
    ) -> None:
        for name, value, least in (
            ("width", width, 2),
            ("num_layers", num_layers, 3),
            ("widening", widening, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more; got {value}")
        self.width, self.num_layers, self.widening = width, num_layers, widening
        super().__init__(
            choices=tuple(
                choice for layer in range(1, num_layers + 1) for choice in _choices(layer)
            ),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "width": width,
                "num_layers": num_layers,
                "widening": widening,
            },
        )

    @property
    def anchors(self) -> Mapping[str, str]:
        """A layer's state in the controller stands for the state that it reads."""
        layers = range(1, self.num_layers + 1)
        return {
            skip_name(source, layer): layer_name(source + 1)
            for layer in layers
            for source in range(layer - 1)
        }

    @property
    def reductions(self) -> tuple[int, int]:
        """The layers after which states are brought down."""
        return self.num_layers // 3, 2 * (self.num_layers // 3)

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        layers = {layer: self._parts(select, layer) for layer in range(1, self.num_layers + 1)}
        blocks, outputs = list[Block](), [0]  # by state, the number of its output; 0 is the stem's

        def place(state: int) -> int:  # the last output is at -1
            return outputs[state] - len(blocks) - 1

        for layer, (operation, skips) in layers.items():
            chs = self._chs(layer)
            places = {place(source): skip for source, skip in skips.items()}
            blocks.append(Block(Layer(chs, operation, place(layer - 1), places), chs, 1))
            outputs.append(len(blocks))
            if layer not in self.reductions:
                continue
            later = [skips for k, (_, skips) in layers.items() if k > layer]
            for state in range(layer + 1):
                read = state == layer or any(_carries(skips.get(state)) for skips in later)
                reduction = Reduction(chs, self._chs(layer + 1), place(state), read)
                blocks.append(Block(reduction, self._chs(layer + 1), 2 if state == 0 else 1))
                outputs[state] = len(blocks)
        return Network(
            stem=nn.Sequential(
                nn.Conv2d(self.in_chans, self.width, 3, padding=1, bias=False),
                nn.BatchNorm2d(self.width),
            ),
            stem_stride=1,
            blocks=blocks,
            final=nn.Identity(),
            num_features=blocks[-1].out_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
            num_inputs=self.num_layers,
        )

    def _parts(self, select: Select, layer: int) -> tuple[nn.Module, dict[int, nn.Module]]:
        """The operation of a layer, and its skips by their source."""
        operation = select(self.by_name[layer_name(layer)], _candidates(self._chs(layer)))
        skips = {
            source: select(self.by_name[skip_name(source, layer)], {CUT: _Cut, JOIN: Join})
            for source in range(layer - 1)
        }
        return operation, skips

    def _chs(self, layer: int) -> int:
        """Channels of the states that a layer reads, and of its own."""
        return self.width * self.widening ** sum(layer > after for after in self.reductions)

    def diagram(self, architecture: Architecture) -> Diagram:
        names = [f"{k} /2" if k in self.reductions else str(k) for k in range(self.num_layers + 1)]
        edges = []
        for layer in range(1, self.num_layers + 1):
            sources = range(layer - 1)
            kept = [s for s in sources if architecture[skip_name(s, layer)] == JOIN]
            edges += [(source, layer, "") for source in kept]
            edges.append((layer - 1, layer, architecture[layer_name(layer)]))
        edges.append((self.num_layers, self.num_layers + 1, ""))
        return Diagram(("stem", *names[1:], "output"), tuple(edges))


_Cut = partial(Zero, 1)


def _choices(layer: int) -> list[Choice]:
    """As the paper's controller settles them."""
    names = [skip_name(source, layer) for source in range(layer - 1)]
    skips = [Choice(name, SKIPS, absent=CUT) for name in names]
    return [Choice(layer_name(layer), OPERATIONS), *skips]


def _candidates(chs: int) -> Candidates:
    builders = (
        *(partial(conv_branch, chs, kernel, sep) for kernel in (3, 5) for sep in (False, True)),
        *(partial(pool_branch, chs, kind) for kind in ("avg", "max")),
    )
    return dict(zip(OPERATIONS, builders, strict=True))


def _carries(skip: nn.Module | None) -> bool:
    """Whether a state goes anywhere by it."""
    return skip is not None and not isinstance(skip, Zero)
