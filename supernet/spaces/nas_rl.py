"""The space of the first search by reinforcement learning (Zoph & Le 2017, sections 3.3 and 4.1):
layers of any shape, each of which reads any of the layers before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Elastic, Searchable, Weights, settled
from supernet.network import Block, Network
from supernet.ops.nas_rl import Concat, Convolution, ElasticConvolution, Shape
from supernet.space import Diagram, SearchSpace, Select

SIDES = ("1", "3", "5", "7")
FILTERS = ("24", "36", "48", "64")
STRIDES = ("1", "2", "3")
CUT, JOIN = SKIPS = ("cut", "join")
LARGEST = (int(SIDES[-1]), int(SIDES[-1]))


def skip_name(source: int, layer: int) -> str:
    return f"skip_{source}_{layer}"


class Chosen(nn.Module):
    """An option, where a module would stand: layers are shaped by several choices at once."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.option = option


class Trunk(Searchable):
    """All layers of a derived network; its output is that of the layers nothing reads, side by
    side."""

    def __init__(self, in_chans: int, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.layers = nn.ModuleList(
            Convolution(sum(_in_chs(shapes, shape, in_chans)), shape) for shape in shapes
        )
        self.inputs = nn.ModuleList(
            Concat() if len(shape.sources) > 1 else nn.Identity() for shape in shapes
        )
        self.ends = unread(shapes)
        self.output = Concat() if len(self.ends) > 1 else nn.Identity()

    def forward(self, image: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, in_chans, H, W) -> (N, filters of the ends, H', W')."""
        states: list[Tensor] = []
        for shape, gather, layer in zip(self.shapes, self.inputs, self.layers, strict=True):
            read = [states[source] for source in shape.sources] or [image]
            states.append(layer(gather(*read)))
        output: Tensor = self.output(*(states[end] for end in self.ends))
        return output


class ElasticTrunk(Elastic):
    """All layers at their largest: with one active option a choice it computes what the `Trunk` of
    that architecture does, and its output has the channels of all layers, zeros for those that are
    read or left out.

    Args:
        space: whose choices name the weights.
    """

    def __init__(self, space: NasRL) -> None:
        super().__init__()
        self.space = space
        self.filters = int(FILTERS[-1])
        self.layers = nn.ModuleList(
            ElasticConvolution(index, space.in_chans, LARGEST, self.filters)
            for index in range(space.num_layers)
        )
        self.gather = Concat()

    def forward(self, image: Tensor, weights: Weights) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_layers * filters, H', W')."""
        shapes = self.space.shapes(settled(self.space.choices, weights))
        states: list[Tensor] = []
        for shape, layer in zip(shapes, self.layers, strict=True):
            read = [states[source] for source in shape.sources] or [image]
            in_chs = _in_chs(shapes, shape, self.space.in_chans)
            states.append(layer(self.gather(*read), shape, in_chs))
        ends = unread(shapes)
        terms = [
            state if index in ends else state.new_zeros(len(state), self.filters, 1, 1)
            for index, state in enumerate(states)
        ]
        return self.gather(*(pad(t, (0, 0, 0, 0, 0, self.filters - t.shape[1])) for t in terms))

    def state_of(self, options: Mapping[str, str]) -> dict[str, Tensor]:
        shapes, state = self.space.shapes(options), dict[str, Tensor]()
        layers: Sequence[Any] = list(self.layers)
        for index, (shape, layer) in enumerate(zip(shapes, layers, strict=True)):
            in_chs = _in_chs(shapes, shape, self.space.in_chans)
            for name, value in layer.state_of(shape, in_chs).items():
                state[f"layers.{index}.{name}"] = value
        return state

    def features_of(self, options: Mapping[str, str]) -> list[int]:
        shapes = self.space.shapes(options)
        return [
            end * self.filters + channel
            for end in unread(shapes)
            for channel in range(shapes[end].filters)
        ]


class NasRL(SearchSpace):
    """Height, width and number of a layer's filters, its stride where `strides`, and for each
    layer before it whether it reads that one: (4^3)^15 * 2^(15 * 14 / 2) = 5.0e58 architectures,
    with strides (4^3 * 3^2)^15 * 2^105.

    Three rules make a network of any of them (section 3.3): a layer that reads none reads the
    image; what no layer reads is put side by side before the classifier; inputs of unequal sizes
    are filled with zeros.

    A convolution's cost depends on several choices at once: costs are not additive.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        num_layers: 15 in the paper's example.
        strides: whether those are chosen too, height and width each; else all are 1.
    """

    additive = False

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 32,
        num_layers: int = 15,
        strides: bool = False,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be 1 or more; got {num_layers}")
        self.num_layers, self.strides = num_layers, strides
        super().__init__(
            choices=tuple(
                choice for layer in range(1, num_layers + 1) for choice in _choices(layer, strides)
            ),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "num_layers": num_layers,
                "strides": strides,
            },
        )

    @property
    def anchors(self) -> Mapping[str, str]:
        return {
            skip_name(source, layer): f"height_{source}"
            for layer in range(1, self.num_layers + 1)
            for source in range(1, layer)
        }

    def shapes(self, options: Mapping[str, str]) -> list[Shape]:
        """What options of all choices say of each layer."""

        def pair(what: str, layer: int) -> tuple[int, int]:
            return int(options[f"{what}height_{layer}"]), int(options[f"{what}width_{layer}"])

        return [
            Shape(
                kernel=pair("", layer),
                stride=pair("stride_", layer) if self.strides else (1, 1),
                filters=int(options[f"filters_{layer}"]),
                sources=tuple(
                    source - 1
                    for source in range(1, layer)
                    if options[skip_name(source, layer)] == JOIN
                ),
            )
            for layer in range(1, self.num_layers + 1)
        ]

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        candidates = {c: {o: partial(Chosen, o) for o in c.options} for c in self.choices}
        found = [(choice.name, select(choice, built)) for choice, built in candidates.items()]
        options = {name: module.option for name, module in found if isinstance(module, Chosen)}
        if len(options) == len(found):
            block = self._block(self.shapes(options))
        else:
            block = Block(ElasticTrunk(self), self.num_layers * int(FILTERS[-1]), 1)
        return Network(
            stem=nn.Identity(),
            stem_stride=1,
            blocks=[block],
            final=nn.Identity(),
            num_features=block.out_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
        )

    def _block(self, shapes: Sequence[Shape]) -> Block:
        """All layers of a derived network."""
        ends = unread(shapes)
        side = max(_side(shapes, end, self.img_size) for end in ends)
        filters = sum(shapes[end].filters for end in ends)
        return Block(Trunk(self.in_chans, shapes), filters, round(self.img_size / side))

    def ends(self) -> Sequence[Architecture]:
        """The least and the most of every shape, without skips, as a chain and with all skips.

        They frame all others exactly where strides are fixed and large kernels are allowed in every
        layer; else, an architecture may lie a little outside.
        """
        reaches = (0, 1, self.num_layers)
        return [self._extreme(*pair) for pair in product((False, True), reaches)]

    def _extreme(self, largest: bool, reach: int) -> Architecture:
        """Of what is not excluded; each layer reads as many of the last ones."""
        options = {}
        for choice in self.choices:
            allowed = self.allowed(choice)
            if choice.options == SKIPS:
                source, layer = map(int, choice.name.split("_")[1:])
                wanted = JOIN if source >= layer - reach else CUT
                options[choice.name] = wanted if wanted in allowed else allowed[0]
            else:  # long strides cost least
                up = largest != choice.name.startswith("stride")
                options[choice.name] = (max if up else min)(allowed, key=int)
        return self.architecture(options)

    def diagram(self, architecture: Architecture) -> Diagram:
        shapes = self.shapes(dict(architecture))
        nodes, edges = ["image"], []
        for number, shape in enumerate(shapes, start=1):
            stride = "" if shape.stride == (1, 1) else " /{}x{}".format(*shape.stride)
            nodes.append("{}x{} {}".format(*shape.kernel, shape.filters) + stride)
            edges += [(source + 1, number, "") for source in shape.sources]
            if not shape.sources:
                edges.append((0, number, ""))
        edges += [(end + 1, len(nodes), "") for end in unread(shapes)]
        return Diagram((*nodes, "classifier"), tuple(edges))


def unread(shapes: Sequence[Shape]) -> list[int]:
    """The layers that no other reads."""
    read = {source for shape in shapes for source in shape.sources}
    return [index for index in range(len(shapes)) if index not in read]


def _choices(layer: int, strides: bool) -> list[Choice]:
    """In the order of the paper's controller (figures 2 and 4)."""
    shape = [Choice(f"{side}_{layer}", SIDES) for side in ("height", "width")]
    if strides:
        shape += [Choice(f"stride_{side}_{layer}", STRIDES) for side in ("height", "width")]
    skips = [Choice(skip_name(source, layer), SKIPS) for source in range(1, layer)]
    return [*shape, Choice(f"filters_{layer}", FILTERS), *skips]


def _in_chs(shapes: Sequence[Shape], shape: Shape, in_chans: int) -> list[int]:
    """Channels of each input of a layer."""
    return [shapes[source].filters for source in shape.sources] or [in_chans]


def _side(shapes: Sequence[Shape], index: int, img_size: int) -> int:
    """Height of a layer's output."""
    sides = list[int]()
    for shape in shapes[: index + 1]:
        read = max((sides[source] for source in shape.sources), default=img_size)
        sides.append(-(-read // shape.stride[0]))
    return sides[index]
