"""A block of MnasNet, derived or with all its candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import pad

from supernet.choice import Choice
from supernet.mixed_ops.base import (
    MixedOp,
    Parts,
    PathWeights,
    Searchable,
    Weights,
)
from supernet.ops.mbconv import mnas_layer
from supernet.spaces.nasbench201 import Sum

WIDTHS = ("75", "100", "125")  # percent of the filters of MobileNetV2
LAYERS = ("-1", "+0", "+1")  # more than MobileNetV2 has
NO_SKIP, IDENTITY, POOL = SKIPS = ("none", "identity", "pool")


@dataclass(frozen=True)
class Reference:
    """A block as MobileNetV2 has it.

    Attributes:
        number: from 1 on.
        width: channels of its output.
        layers: their number.
        stride: of the first one.
    """

    number: int
    width: int
    layers: int
    stride: int

    @property
    def widths(self) -> dict[str, int]:
        """Channels by option."""
        return {option: self.width * int(option) // 100 for option in WIDTHS}

    @property
    def most(self) -> int:
        """Channels."""
        return max(self.widths.values())

    @property
    def depths(self) -> dict[str, int]:
        """Layers by option: a block keeps one."""
        depths = {option: self.layers + int(option) for option in LAYERS}
        return {option: depth for option, depth in depths.items() if depth}

    @property
    def later(self) -> range:
        """The layers after the first, that are or may be."""
        return range(2, max(self.depths.values()) + 1)


@dataclass(frozen=True)
class Form:
    """What the choices say of a block.

    Attributes:
        se: squeeze-and-excitation ratio in percent.
        skip: one of `SKIPS`.
        layers: their number.
    """

    op: str
    kernel: int
    se: int
    skip: str
    in_chs: int
    out_chs: int
    layers: int


class Residual(Parts):
    """Adds a layer's input to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = Sum()

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        return self.sum(*terms)


class Pooled(Parts):
    """Adds a layer's input, averaged over 3x3, to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.sum = Sum()

    def forward(self, terms: Sequence[Tensor]) -> Tensor:
        x, y = terms
        return self.sum(self.pool(x), y)


class Absent(nn.Module):
    """In place of a layer or a skip path that is not there. A derived network leaves it out."""


SKIP_PATHS: Mapping[str, Callable[[], nn.Module]] = {IDENTITY: Residual, POOL: Pooled}


class Stage(Searchable):
    """Layers in a row, all but the first with a skip path or without.

    Args:
        layers: the first one, and the others or `Absent`.
        skips: of all but the first, in the same order.
    """

    def __init__(self, layers: Sequence[nn.Module], skips: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(m for m in layers if not isinstance(m, Absent))
        self.skips = nn.ModuleDict(
            {str(i): m for i, m in enumerate(skips, start=1) if not isinstance(m, Absent)}
        )

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        for index, layer in enumerate(self.layers):
            y = layer(x)
            x = self.skips[str(index)]([x, y]) if str(index) in self.skips else y
        return x


class MixedStage(Searchable):
    """Every candidate of a block, each on an input of its width, for what it costs.

    Args:
        before: channels of the input by width.
        widths: channels of the output by width.
        first: a mixed op, as all of these; its options end with the width before, unless there is
            but one, and the width.
        layers: the options of each end with the width.
        skips: likewise.
    """

    def __init__(
        self,
        before: Mapping[str, int],
        widths: Mapping[str, int],
        first: nn.Module,
        layers: Sequence[nn.Module],
        skips: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.before, self.widths = dict(before), dict(widths)
        assert isinstance(first, MixedOp)
        self.first = first
        self.layers, self.skips = nn.ModuleList(layers), nn.ModuleList(skips)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, most of before, H, W) -> (N, most of widths, H / stride, W / stride), the sum over
        all active widths."""
        states = dict[str, Tensor]()
        length = min(len(self.before), 2)
        for ending, path in _by_ending(self.first.choice, weights, length).items():
            source, width = ending[0] if length == 2 else next(iter(self.before)), ending[-1]
            y = self.first(x[:, : self.before[source]], {self.first.choice.name: path})
            states[width] = states[width] + y if width in states else y
        for layer, skip in zip(self.layers, self.skips, strict=True):
            assert isinstance(layer, MixedOp) and isinstance(skip, MixedOp)
            skips = _by_ending(skip.choice, weights, 1)
            for ending, path in _by_ending(layer.choice, weights, 1).items():
                state = states[ending[0]]
                y = layer(state, {layer.choice.name: path})
                if ending in skips:
                    y = skip([state, y], {skip.choice.name: skips[ending]})
                states[ending[0]] = y
        most = max(self.widths.values())
        output = x.new_zeros(())
        for state in states.values():
            output = output + pad(state, (0, 0, 0, 0, 0, most - state.shape[1]))
        return output


class MixedHead(Searchable):
    """The last convolution, for each width of the last block.

    Args:
        widths: channels of the input by width, the options of the choice.
    """

    def __init__(self, widths: Mapping[str, int], conv: MixedOp) -> None:
        super().__init__()
        self.widths, self.conv = dict(widths), conv

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, most of widths, H, W) -> (N, C, H, W)."""
        choice, output = self.conv.choice, x.new_zeros(())
        for index in weights[choice.name].active:
            part = x[:, : self.widths[choice.options[index]]]
            output = output + self.conv(part, {choice.name: PathWeights((index,))})
        return output


def _by_ending(choice: Choice, weights: Weights, length: int) -> dict[tuple[str, ...], PathWeights]:
    """The active options by their last parts, without the absent one."""
    found = dict[tuple[str, ...], list[int]]()
    for index in weights[choice.name].active:
        if (option := choice.options[index]) != choice.absent:
            found.setdefault(tuple(option.split("_")[-length:]), []).append(index)
    return {ending: PathWeights(tuple(indices)) for ending, indices in found.items()}


def layer_of(op: str, kernel: int, se: int, stride: int, in_chs: int, out_chs: int) -> nn.Module:
    return mnas_layer(op, kernel, se / 100, in_chs, out_chs, stride)
