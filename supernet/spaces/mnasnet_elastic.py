"""A block of MnasNet in a supernet that is trained: all widths share weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from supernet.choice import Choice
from supernet.mixed_ops.base import Elastic, Weights, only_options
from supernet.ops.sliced import Sliced
from supernet.spaces.mnasnet_stage import NO_SKIP, SKIP_PATHS, Form, layer_of

FormOf = Callable[[Mapping[str, str]], Form]  # from the options by choice


class ElasticStage(Elastic):
    """Layers of all kinds at their widest: kinds and places share no weights, widths do.

    Args:
        choices: of the space, but for the implied ones.
        form_of: what their options say of this block.
        kinds: operation, kernel and squeeze-and-excitation ratio in percent, each.
        in_chs, out_chs: the largest.
        stride: of the first layer.
        layers: the largest number.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        form_of: FormOf,
        kinds: Sequence[tuple[str, int, int]],
        in_chs: int,
        out_chs: int,
        stride: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.choices, self.form_of = choices, form_of
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    _name(*kind): Sliced(
                        partial(layer_of, *kind, stride if index == 0 else 1),
                        in_chs if index == 0 else out_chs,
                        out_chs,
                    )
                    for kind in kinds
                }
            )
            for index in range(layers)
        )
        self.skips = nn.ModuleDict({skip: path() for skip, path in SKIP_PATHS.items()})

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride), of the widths that are active."""
        form = self.form_of(only_options(self.choices, weights))
        for index in range(form.layers):
            y = self._at(index, form)(x, form.out_chs)
            x = self.skips[form.skip]([x, y]) if index and form.skip != NO_SKIP else y
        return x

    def _at(self, index: int, form: Form) -> Sliced:
        kinds = self.layers[index]
        assert isinstance(kinds, nn.ModuleDict)
        layer = kinds[_name(form.op, form.kernel, form.se)]
        assert isinstance(layer, Sliced)
        return layer

    def state_of(self, options: Mapping[str, str]) -> dict[str, Tensor]:
        form, state = self.form_of(options), dict[str, Tensor]()
        for index in range(form.layers):
            in_chs = form.out_chs if index else form.in_chs
            part = self._at(index, form).state_of(in_chs, form.out_chs)
            state |= {f"layers.{index}.{name}": value for name, value in part.items()}
        return state


class ElasticHead(Elastic):
    """The last convolution, for any width of the last block, of which `form_of` says the form."""

    def __init__(self, form_of: FormOf, conv: Sliced, out_chs: int) -> None:
        super().__init__()
        self.form_of, self.conv, self.out_chs = form_of, conv, out_chs

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return self.conv(x, self.out_chs)

    def state_of(self, options: Mapping[str, str]) -> dict[str, Tensor]:
        return self.conv.state_of(self.form_of(options).out_chs, self.out_chs)


def _name(op: str, kernel: int, se: int) -> str:
    return f"{op}_{kernel}_{se}"
