"""Modules of several sizes that share weights: a small one has the first part of each weight of the
largest (Yu et al. 2019, "Slimmable neural networks")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


def part_of(whole: nn.Module, form: nn.Module) -> dict[str, Tensor]:
    """Of a module's parameters and buffers, what a smaller form of it takes: views of them."""
    state = whole.state_dict(keep_vars=True)
    return {
        name: state[name][tuple(map(slice, like.shape))]
        for name, like in form.state_dict().items()
    }


def run_part(whole: nn.Module, form: nn.Module, x: Tensor) -> Tensor:
    """What a smaller form of a module makes of `x` with its part of the weights.

    Args:
        form: without content; its modules are named as those of `whole` that they stand for.
    """
    theirs = dict(whole.named_modules())
    for name, own in form.named_modules():
        own.training = theirs[name].training
        if isinstance(own, _BatchNorm):
            own.momentum = theirs[name].momentum  # recalibration changes it
    output: Tensor = functional_call(form, part_of(whole, form), (x,), strict=True)
    return output


class Sliced(nn.Module):
    """Holds a layer at its widest and runs it at any width, with the first part of each weight.

    Args:
        build: from a number of input and of output channels to a layer; every tensor of a narrow
            one is no larger, in any direction, than that of the widest.
        in_chs, out_chs: the largest.
    """

    def __init__(self, build: Callable[[int, int], nn.Module], in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.build = build
        self.widest = build(in_chs, out_chs)
        self._forms: dict[tuple[int, int], nn.Module] = {}

    def _form(self, in_chs: int, out_chs: int) -> nn.Module:
        """The layer of these widths, without content."""
        if (in_chs, out_chs) not in self._forms:
            with torch.device("meta"):
                self._forms[in_chs, out_chs] = self.build(in_chs, out_chs)
        return self._forms[in_chs, out_chs]

    def state_of(self, in_chs: int, out_chs: int) -> dict[str, Tensor]:
        """The state of the layer of these widths."""
        part = part_of(self.widest, self._form(in_chs, out_chs))
        return {name: value.detach() for name, value in part.items()}

    def forward(self, x: Tensor, out_chs: int) -> Tensor:
        """(N, C, H, W) -> (N, out_chs, H / stride, W / stride)."""
        return run_part(self.widest, self._form(x.shape[1], out_chs), x)
