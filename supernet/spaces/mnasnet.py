"""The factorised hierarchical search space of MnasNet (Tan et al. 2019, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product

from timm.layers import ConvNormAct
from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates, MixedOp
from supernet.network import Block, Network
from supernet.ops.sliced import Sliced
from supernet.space import Diagram, SearchSpace, Select
from supernet.spaces.combined import Combined, Part
from supernet.spaces.mnasnet_elastic import ElasticHead, ElasticStage
from supernet.spaces.mnasnet_stage import (
    NO_SKIP,
    SKIP_PATHS,
    SKIPS,
    WIDTHS,
    Absent,
    Form,
    MixedHead,
    MixedStage,
    Reference,
    Stage,
    layer_of,
)
from supernet.spaces.nas_rl import Chosen

RATIOS = ("0", "25")  # of squeeze-and-excitation, in percent
STEM = "stem"  # what the first block reads


class MnasNet(SearchSpace):
    """Operation, kernel, squeeze-and-excitation, skip path, filters and number of layers of each of
    the seven blocks of MobileNetV2: 432^5 * 288^2 = 1.2e18 architectures, 432 a block as in the
    paper's example, and 288 where MobileNetV2 has one layer and none can be taken away.

    All layers of a block are alike but for the first, which has the stride. The paper leaves open,
    and here it is so: an inverted bottleneck expands 3 or 6 times, as in MnasNet-A1 (figure 7);
    the skip path "pooling" is the average over 3x3; the first layer of a block, whose width or
    resolution changes, has no skip path (with the numbers of MobileNetV2 the official code has no
    identity there either).

    A layer costs what several choices say together, and a first one also depends on the filters of
    the block before. Therefore each layer and each skip path has an implied choice with an option
    for each combination: with these, costs are sums over choices, and exact. Only a supernet that
    is to be trained is built otherwise: there all widths share weights (`Sliced`), and one option a
    choice runs.

    Args:
        in_chans: channels of the image.
        img_size: side of the image a derived network declares.
        stem_chs: width of the 3x3 stem.
        stem_stride: 2 in the paper; 1 for small images.
        stages: (width, layers, stride) of each block, to which the choices are relative.
        kernels: candidate kernel sizes, odd.
        expansions: of the inverted bottleneck.
        head_chs: width of the last 1x1 convolution.
    """

    interchangeable = False

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 224,
        stem_chs: int = 32,
        stem_stride: int = 2,
        stages: Sequence[Sequence[int]] = (
            (16, 1, 1),
            (24, 2, 2),
            (32, 3, 2),
            (64, 4, 2),
            (96, 3, 1),
            (160, 3, 2),
            (320, 1, 1),
        ),
        kernels: Sequence[int] = (3, 5),
        expansions: Sequence[int] = (3, 6),
        head_chs: int = 1280,
    ) -> None:
        _check(stages, kernels, expansions)
        self.blocks = [Reference(number, *stage) for number, stage in enumerate(stages, start=1)]
        self.stem_chs, self.stem_stride, self.head_chs = stem_chs, stem_stride, head_chs
        self.operations = ("conv", "sepconv", *(f"mbconv{expansion}" for expansion in expansions))
        self.kernels = tuple(map(str, kernels))
        self.own = [{c.name: c for c in self._decided(block)} for block in self.blocks]
        self.combined = [found for block in self.blocks for found in self._combined(block)]
        rules = tuple(rule for combined in self.combined for rule in combined.rules())
        self._num_rules = len(rules)
        super().__init__(
            choices=(
                *chain.from_iterable(own.values() for own in self.own),
                *(combined.choice for combined in self.combined),
            ),
            settings={
                "in_chans": in_chans,
                "img_size": img_size,
                "stem_chs": stem_chs,
                "stem_stride": stem_stride,
                "stages": [list(stage) for stage in stages],
                "kernels": list(kernels),
                "expansions": list(expansions),
                "head_chs": head_chs,
            },
            constraints=rules,
        )

    def _decided(self, block: Reference) -> Iterator[Choice]:
        """In the order of the paper's list. The width of the last block says what the head costs,
        all others nothing alone."""
        for name, options in (
            ("op", self.operations),
            ("kernel", self.kernels),
            ("se", RATIOS),
            ("skip", SKIPS),
            ("width", WIDTHS),
            ("layers", tuple(block.depths)),
        ):
            free = name != "width" or block is not self.blocks[-1]
            yield Choice(f"{name}_{block.number}", options, free=free)

    def _combined(self, block: Reference) -> Iterator[Combined]:
        """What each layer and each skip path depends on."""
        number, own = block.number, self.own[block.number - 1]

        def parts(*names: str) -> tuple[Part, ...]:
            return tuple((own[f"{n}_{number}"], own[f"{n}_{number}"].options) for n in names)

        kind, width = parts("op", "kernel", "se"), parts("width")
        before = [self.own[number - 2][f"width_{number - 1}"]] if number > 1 else []
        reads = tuple((choice, choice.options) for choice in before)
        yield Combined(f"first_{number}", (*kind, *reads, *width))
        for layer in block.later:
            long = tuple(option for option, depth in block.depths.items() if depth >= layer)
            there = own[f"layers_{number}"], long
            yield Combined(f"layer_{number}_{layer}", (*kind, *width), there)
            path = own[f"skip_{number}"], tuple(SKIP_PATHS)
            yield Combined(f"path_{number}_{layer}", (path, *width), there)

    def _before(self, block: Reference) -> dict[str, int]:
        """Channels that a block may read, by the option of the block before."""
        return {STEM: self.stem_chs} if block.number == 1 else self.blocks[block.number - 2].widths

    def implied(self, options: Mapping[str, str]) -> Mapping[str, str]:
        return {combined.name: combined.implied(options) for combined in self.combined}

    def is_valid(self, architecture: Architecture) -> bool:
        """What is implied keeps the rules of combinations; the other constraints are looked at."""
        added = self.constraints[self._num_rules :]
        return self.excluded.isdisjoint(architecture) and all(
            constraint.holds(architecture) for constraint in added
        )

    def exclude(self, patterns: Sequence[str]) -> None:
        """As for any space; what an excluded option is part of goes with it."""
        super().exclude(patterns)
        self.excluded |= {pair for c in self.combined for pair in c.without(self.excluded)}

    def scores(self, option_scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is implied counts nothing, unless it is given."""
        given = next(iter(option_scores.values()))
        nothing = {c.name: given.new_zeros(len(c.options)) for c in self.choices if c.implied}
        return {**nothing, **option_scores}

    def shares(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Choices are independent: a combination has the product of their probabilities."""
        found = {combined.name: combined.share(probabilities) for combined in self.combined}
        return {choice.name: {**probabilities, **found}[choice.name] for choice in self.choices}

    def form(self, number: int, options: Mapping[str, str]) -> Form:
        """What options of all choices say of a block."""
        block = self.blocks[number - 1]
        op, kernel, se, skip, width, layers = (options[name] for name in self.own[number - 1])
        before = options[f"width_{number - 1}"] if number > 1 else STEM
        return Form(
            op=op,
            kernel=int(kernel),
            se=int(se),
            skip=skip,
            in_chs=self._before(block)[before],
            out_chs=block.widths[width],
            layers=block.depths[layers],
        )

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        conv = partial(ConvNormAct, act_layer=nn.ReLU)
        last = self.blocks[-1]
        if search:
            blocks = [self._elastic(block) for block in self.blocks]
            widest = Sliced(partial(conv, kernel_size=1), last.most, self.head_chs)
            final: nn.Module = ElasticHead(partial(self.form, last.number), widest, self.head_chs)
        else:
            blocks = [self._block(select, block) for block in self.blocks]
            candidates: Candidates = {
                width: partial(conv, chs, self.head_chs, 1) for width, chs in last.widths.items()
            }
            final = select(self.by_name[f"width_{last.number}"], candidates)
            if isinstance(final, MixedOp):
                final = MixedHead(last.widths, final)
        return Network(
            stem=conv(self.in_chans, self.stem_chs, 3, stride=self.stem_stride),
            stem_stride=self.stem_stride,
            blocks=blocks,
            final=final,
            num_features=self.head_chs,
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.img_size,
        )

    def _elastic(self, block: Reference) -> Block:
        """Of the supernet that is trained."""
        kinds = product(self.operations, map(int, self.kernels), map(int, RATIOS))
        stage = ElasticStage(
            self.decided, partial(self.form, block.number), list(kinds),
            max(self._before(block).values()), block.most, block.stride, len(block.later) + 1,
        )  # fmt: skip
        return Block(stage, block.most, block.stride)

    def _block(self, select: Select, block: Reference) -> Block:
        """Of a derived network, or with every candidate."""
        number, before, widths = block.number, self._before(block), block.widths

        def layer(option: str, is_first: bool) -> nn.Module:
            op, kernel, se, *source, width = option.split("_")
            in_chs = before[source[0] if source else STEM] if is_first else widths[width]
            stride = block.stride if is_first else 1
            return layer_of(op, int(kernel), int(se), stride, in_chs, widths[width])

        def at(name: str) -> nn.Module:
            choice, builders = self.by_name[name], dict[str, Callable[[], nn.Module]]()
            for option in choice.options:
                if option == choice.absent:
                    builders[option] = Absent
                elif name.startswith("path"):
                    builders[option] = SKIP_PATHS[option.split("_")[0]]
                else:
                    builders[option] = partial(layer, option, name.startswith("first"))
            return select(choice, builders)

        first = at(f"first_{number}")
        layers = [at(f"layer_{number}_{later}") for later in block.later]
        skips = [at(f"path_{number}_{later}") for later in block.later]
        chosen = select(self.by_name[f"width_{number}"], {w: partial(Chosen, w) for w in widths})
        if isinstance(chosen, Chosen):
            return Block(Stage([first, *layers], skips), widths[chosen.option], block.stride)
        return Block(MixedStage(before, widths, first, layers, skips), block.most, block.stride)

    def diagram(self, architecture: Architecture) -> Diagram:
        labels, options = ["image", f"stem {self.stem_chs}"], dict(architecture)
        for block in self.blocks:
            form = self.form(block.number, options)
            label = f"{form.layers} x {form.op} k{form.kernel} {form.out_chs}"
            label += f" se{form.se}" if form.se else ""
            label += f" {form.skip}" if form.skip != NO_SKIP and form.layers > 1 else ""
            labels.append(label + (f" /{block.stride}" if block.stride > 1 else ""))
        labels.append(f"head {self.head_chs}")
        return Diagram(tuple(labels), tuple((i, i + 1, "") for i in range(len(labels) - 1)))


def _check(
    stages: Sequence[Sequence[int]], kernels: Sequence[int], expansions: Sequence[int]
) -> None:
    if not stages:
        raise ValueError("stages must have one block or more; got none")
    for stage in stages:
        if len(stage) != 3:
            raise ValueError(f"a stage is [width, layers, stride]; got {list(stage)}")
        if stage[0] < 4 or stage[0] % 4:
            raise ValueError(
                "widths of stages must be multiples of 4, so that 75 and 125 percent of them are "
                f"whole numbers; got {stage[0]}"
            )
        if stage[1] < 1:
            raise ValueError(f"a stage has one layer or more; got {stage[1]}")
    if bad := [kernel for kernel in kernels if kernel % 2 == 0]:
        raise ValueError(f"kernels must be odd, as 3 and 5 are; got {bad[0]}")
    if bad := [expansion for expansion in expansions if expansion < 1]:
        raise ValueError(f"expansions must be 1 or more; got {bad[0]}")
