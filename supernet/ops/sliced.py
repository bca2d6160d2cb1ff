"""Layers of several widths that share weights: a narrow one is the first channels of the widest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


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
        """The state of the layer of these widths: views of the widest one's."""
        whole = {**dict(self.widest.named_parameters()), **dict(self.widest.named_buffers())}
        return {
            name: whole[name][tuple(map(slice, like.shape))]
            for name, like in self._form(in_chs, out_chs).state_dict().items()
        }

    def forward(self, x: Tensor, out_chs: int) -> Tensor:
        """(N, C, H, W) -> (N, out_chs, H / stride, W / stride)."""
        form = self._form(x.shape[1], out_chs)
        for own, theirs in zip(form.modules(), self.widest.modules(), strict=True):
            own.training = theirs.training
            if isinstance(own, _BatchNorm) and isinstance(theirs, _BatchNorm):
                own.momentum = theirs.momentum
        output: Tensor = functional_call(form, self.state_of(x.shape[1], out_chs), (x,))
        return output
