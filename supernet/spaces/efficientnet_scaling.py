"""Compound scaling (Tan & Le 2019, section 3.3): how a network grows in depth, width and
resolution."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from timm.layers import ConvNormAct, get_act_layer
from torch import nn

from supernet.choice import Architecture, Choice
from supernet.mixed_ops.base import Candidates
from supernet.network import Block, Network
from supernet.ops.mbconv import check_act, decode_stage, scaled_chs, scaled_stage
from supernet.ops.scaling import ElasticModule, Stem
from supernet.space import Diagram, LinearConstraint, SearchSpace, Select, Way
from supernet.spaces.nas_rl import Chosen

EXPONENTS = {"depth": 1, "width": 2, "resolution": 2}  # of a coefficient, in what a network costs
B0 = (  # the official code's; strings as in timm
    "ds_r1_k3_s1_e1_c16_se0.25",
    "ir_r2_k3_s2_e6_c24_se0.25",
    "ir_r2_k5_s2_e6_c40_se0.25",
    "ir_r3_k3_s2_e6_c80_se0.25",
    "ir_r3_k5_s1_e6_c112_se0.25",
    "ir_r4_k5_s2_e6_c192_se0.25",
    "ir_r1_k3_s1_e6_c320_se0.25",
)


class EfficientNetScaling(SearchSpace):
    """The coefficients alpha of depth, beta of width and gamma of resolution by which a base
    network is multiplied (equation 3).

    An architecture is a direction to grow in: at `phi` its network has alpha^phi times the blocks
    of each stage, beta^phi times the channels, and reads images of gamma^phi times the side. It is
    valid if alpha beta^2 gamma^2 is about 2; then its network costs about 2^phi times the base, and
    more where rounding up its few blocks counts: 1.9 to 2.8 times B0 at phi=1, 2.6 by the paper's
    triple. A budget or a limit of the objective bounds what networks really cost.

    Channels and blocks are rounded as in the official code. Costs are not additive.

    Args:
        in_chans: channels of the image.
        img_size: side of the images that come. A network resizes them to its own resolution, which
            is what it declares as its input.
        resolution: what the base network reads; None for `img_size`.
        stem_chs: width of the 3x3 stem.
        stem_stride: 2 in the paper; 1 for small images.
        stages: timm's block string of each; those of EfficientNet-B0 by default.
        head_chs: width of the last 1x1 convolution.
        divisor: of the numbers of channels.
        act: timm's name of the activation.
        depths, widths, resolutions: the coefficients to choose from, of at least 1.
        growth: what alpha beta^2 gamma^2 should be.
        tolerance: by which share it may differ from that; None admits all triples.
        phi: the compound coefficient; 1 in the search, larger for the networks of the family.
    """

    additive = False

    def __init__(
        self,
        *,
        in_chans: int = 3,
        img_size: int = 224,
        resolution: int | None = None,
        stem_chs: int = 32,
        stem_stride: int = 2,
        stages: Sequence[str] = B0,
        head_chs: int = 1280,
        divisor: int = 8,
        act: str = "swish",
        depths: Sequence[float] = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
        widths: Sequence[float] = (1.0, 1.1, 1.2, 1.3, 1.4),
        resolutions: Sequence[float] = (1.0, 1.15, 1.3),
        growth: float = 2.0,
        tolerance: float | None = 0.1,
        phi: float = 1,
    ) -> None:
        if phi < 0:
            raise ValueError(f"phi must be 0 (the base network) or more; got {phi}")
        if divisor < 1:
            raise ValueError(f"divisor must be 1 or more, as 8 is; got {divisor}")
        check_act(act)
        self.resolution, self.phi = resolution or img_size, phi
        self.stem_chs, self.stem_stride, self.head_chs = stem_chs, stem_stride, head_chs
        self.stages, self.divisor, self.act = tuple(stages), divisor, act
        self.base = [decode_stage(stage) for stage in self.stages]
        choices = (
            _choice("depth", depths),
            _choice("width", widths),
            _choice("resolution", resolutions),
        )
        super().__init__(
            choices=choices,
            settings={
                "in_chans": in_chans, "img_size": img_size, "resolution": resolution,
                "stem_chs": stem_chs, "stem_stride": stem_stride, "stages": self.stages,
                "head_chs": head_chs, "divisor": divisor, "act": act, "depths": list(depths),
                "widths": list(widths), "resolutions": list(resolutions), "growth": growth,
                "tolerance": tolerance, "phi": phi,
            },
            constraints=() if tolerance is None else (_about(choices, growth, tolerance),),
        )  # fmt: skip
        if not self._valid_ways():
            products = sorted(_product(way) for way in self._all_ways())
            raise ValueError(
                f"no depth * width^2 * resolution^2 is within {tolerance:.4g} of {growth:.4g}: of "
                f"these coefficients they are {products[0]:.4g} to {products[-1]:.4g}; list other "
                "ones, or raise tolerance"
            )

    def _all_ways(self) -> list[Way]:
        pairs = [[(choice.name, o) for o in self.allowed(choice)] for choice in self.choices]
        return list(product(*pairs))

    def _valid_ways(self) -> list[Way]:
        return [w for w in self._all_ways() if all(row.holds(w) for row in self.constraints)]

    def ways(self) -> Sequence[Sequence[Way]]:
        """All triples that are valid, as one group: they are few of all."""
        return [self._valid_ways()]

    def scale(self, name: str, options: Mapping[str, str]) -> float:
        """By what depth, width or resolution is multiplied: its coefficient to the power of phi."""
        return _coefficient(options[name]) ** self.phi

    def chs(self, base: int, options: Mapping[str, str]) -> int:
        return scaled_chs(base, self.scale("width", options), self.divisor)

    def side(self, options: Mapping[str, str]) -> int:
        """Of the images that a network reads."""
        return round(self.resolution * self.scale("resolution", options))

    @property
    def base_widths(self) -> list[int]:
        """Of the base network's stem and stages."""
        return [self.stem_chs, *(blocks[-1]["out_chs"] for blocks in self.base)]

    def arch_def(self, options: Mapping[str, str]) -> list[list[str]]:
        """timm's block strings of a network."""
        found = []
        for definition, base_width in zip(self.stages, self.base_widths[1:], strict=True):
            parts = [part for part in definition.split("_") if not re.fullmatch(r"[rc]\d+", part)]
            blocks = len(decode_stage(definition, self.scale("depth", options)))
            parts += [f"r{blocks}", f"c{self.chs(base_width, options)}"]
            found.append(["_".join(parts)])
        return found

    def _stem(self, options: Mapping[str, str]) -> nn.Module:
        chs, side = self.chs(self.stem_chs, options), self.side(options)
        return Stem(self.in_chans, chs, self.stem_stride, self.act, side)

    def _stage(self, index: int, options: Mapping[str, str]) -> nn.Module:
        depth, width = self.scale("depth", options), self.scale("width", options)
        in_chs = self.chs(self.base_widths[index], options)
        return scaled_stage(self.stages[index], in_chs, depth, width, self.divisor, self.act)

    def _final(self, options: Mapping[str, str]) -> nn.Module:
        in_chs, act = self.chs(self.base_widths[-1], options), get_act_layer(self.act)
        return ConvNormAct(in_chs, self._num_features(options), 1, act_layer=act)

    def _num_features(self, options: Mapping[str, str]) -> int:
        return self.chs(self.head_chs, options)

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        """A supernet asks for no module: all choices together say what each part of it runs."""
        if search:
            options = {c.name: max(c.options, key=_coefficient) for c in self.choices}
            place: Any = partial(ElasticModule, choices=self.choices, largest=options)
        else:
            options = {}
            for choice in self.choices:
                candidates: Candidates = {o: partial(Chosen, o) for o in choice.options}
                chosen: Any = select(choice, candidates)
                options[choice.name] = chosen.option

            def place(build: Any, num_features: Any = None) -> nn.Module:
                found: nn.Module = build(options)
                return found

        return Network(
            stem=place(self._stem),
            stem_stride=self.stem_stride,
            blocks=[
                Block(
                    place(partial(self._stage, index)),
                    self.chs(self.base_widths[index + 1], options),
                    blocks[0]["stride"],
                )
                for index, blocks in enumerate(self.base)
            ],
            final=place(self._final, num_features=self._num_features),
            num_features=self._num_features(options),
            num_classes=num_classes,
            in_chans=self.in_chans,
            img_size=self.side(options),
        )

    def ends(self) -> Sequence[Architecture]:
        """Valid triples that are below, or above, no other one: costs grow with each
        coefficient."""
        triples = {way: tuple(_coefficient(o) for _, o in way) for way in self._valid_ways()}

        def leads(way: Way, sign: int) -> bool:
            own = triples[way]
            return not any(
                other != own and all(sign * a >= sign * b for a, b in zip(other, own, strict=True))
                for other in triples.values()
            )

        return [
            self.architecture(dict(way)) for way in triples if leads(way, 1) or leads(way, -1)
        ]

    def diagram(self, architecture: Architecture) -> Diagram:
        options = dict(architecture)
        labels = ["image", f"resize {self.side(options)}"]
        labels.append(f"stem {self.chs(self.stem_chs, options)}" + _stride(self.stem_stride))
        for (definition,), base in zip(self.arch_def(options), self.base, strict=True):
            kind, *parts, blocks, chs = definition.split("_")
            words = [kind, *(p for p in parts if re.fullmatch(r"[ke]\d+", p)), chs[1:]]
            labels.append(f"{blocks[1:]} x {' '.join(words)}" + _stride(base[0]["stride"]))
        labels.append(f"head {self._num_features(options)}")
        return Diagram(tuple(labels), tuple((i, i + 1, "") for i in range(len(labels) - 1)))


def _choice(name: str, coefficients: Sequence[float]) -> Choice:
    """Options in percent: names have no dots."""
    for value in coefficients:
        if value < 1 or abs(100 * value - round(100 * value)) > 1e-6:
            raise ValueError(
                f"{name}s must be coefficients of 1 or more, in whole hundredths as 1.15 is; got "
                f"{value}"
            )
    return Choice(name, tuple(f"{round(100 * value)}%" for value in coefficients))


def _coefficient(option: str) -> float:
    return int(option.removesuffix("%")) / 100


def _product(way: Way) -> float:
    """alpha beta^2 gamma^2."""
    return math.prod(_coefficient(option) ** EXPONENTS[name] for name, option in way)


def _about(choices: Sequence[Choice], growth: float, tolerance: float) -> LinearConstraint:
    """Equation 3, a sum of logarithms."""
    if growth < 1 or not 0 <= tolerance < 1:
        raise ValueError(
            "growth must be 1 or more, and tolerance from 0 to below 1, or null; got "
            f"{growth=}, {tolerance=}"
        )
    terms = {
        (choice.name, option): EXPONENTS[choice.name] * math.log(_coefficient(option))
        for choice in choices
        for option in choice.options
    }
    lower, upper = (math.log(growth * (1 + share)) for share in (-tolerance, tolerance))
    return LinearConstraint(terms, lower - 1e-6, upper + 1e-6)  # which a rounding may miss


def _stride(stride: int) -> str:
    return "" if stride == 1 else f" /{stride}"
