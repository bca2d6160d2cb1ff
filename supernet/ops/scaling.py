"""Parts of networks of any depth, width and resolution, and of the supernet that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from timm.layers import ConvNormAct, get_act_layer
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from supernet.choice import Choice
from supernet.mixed_ops.base import Elastic, Weights, only_options
from supernet.ops.sliced import part_of, run_part


class Stem(ConvNormAct):
    """3x3 convolution, batch norm and activation, of the image at the network's own resolution: an
    image of another size is resized first."""

    def __init__(self, in_chans: int, out_chs: int, stride: int, act: str, resolution: int) -> None:
        super().__init__(in_chans, out_chs, 3, stride=stride, act_layer=get_act_layer(act))
        self.resolution = resolution

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, out_chs, resolution / stride, resolution / stride)."""
        side = self.resolution, self.resolution
        if x.shape[2:] != side:
            # not every device has it in half precision
            x = interpolate(x.float(), side, mode="bilinear", antialias=True).to(x.dtype)
        y: Tensor = super().forward(x)
        return y


class ElasticModule(Elastic):
    """A module in its largest form; a smaller one takes the first blocks of it, and of each weight
    the first channels.

    Args:
        build: from options of all choices to the module.
        choices: of the space.
        largest: options with which no weight is smaller than with any others.
        num_features: of what the classifier reads, where it reads the output of this module: they
            are filled up with zeros to those of the largest form.
    """

    def __init__(
        self,
        build: Callable[[Mapping[str, str]], nn.Module],
        choices: Sequence[Choice],
        largest: Mapping[str, str],
        num_features: Callable[[Mapping[str, str]], int] | None = None,
    ) -> None:
        super().__init__()
        self.build, self.choices, self.num_features = build, tuple(choices), num_features
        self.largest = dict(largest)
        self.whole = build(largest)
        self._forms: dict[tuple[str, ...], nn.Module] = {}  # no modules of this one

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """What the module of the active options makes of `x`."""
        options = only_options(self.choices, weights)
        y = run_part(self.whole, self._form(options), x)
        if self.num_features is None:
            return y
        return pad(y, (0, 0, 0, 0, 0, self.num_features(self.largest) - y.shape[1]))

    def state_of(self, options: Mapping[str, str]) -> dict[str, Tensor]:
        part = part_of(self.whole, self._form(options))
        return {name: value.detach() for name, value in part.items()}

    def features_of(self, options: Mapping[str, str]) -> Sequence[int] | None:
        return None if self.num_features is None else range(self.num_features(options))

    def _form(self, options: Mapping[str, str]) -> nn.Module:
        """The module of these options, without content."""
        key = tuple(options[choice.name] for choice in self.choices)
        if key not in self._forms:
            with torch.device("meta"):
                self._forms[key] = self.build(options)
        return self._forms[key]
