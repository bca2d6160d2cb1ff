"""A forward pass as the memory it takes: which storages each operation touches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_FOLDS_NORM = (_aten.convolution.default, _aten.addmm.default, _aten.mm.default)
_TRAINING = 5  # position of that argument of `native_batch_norm`


class Tape(TorchDispatchMode):
    """Which storages each operation touches, in order; parameters and buffers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[frozenset[int]] = []
        self.sizes: dict[int, int] = {}  # bytes of each activation
        self.folding: set[int] = set()  # made by a layer that a batch norm can be folded into
        self.norms: list[tuple[int, int, int]] = []  # operation, storages of input and output
        self.vague: set[int] = set()  # of stand-ins: any batch norm may be folded into them
        self._alive: list[Tensor] = []  # a storage that is freed would lend its address to another

    def run(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Record one evaluation pass."""
        modes = {module: module.training for module in network.modules()}
        named = itertools.chain(network.named_parameters(), network.named_buffers())
        state = {name: tensor.to("meta") for name, tensor in named}
        dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
        x = torch.empty(*input_shape, dtype=dtype, device="meta")
        self.create(x)
        self.touch(x)
        try:
            network.eval()
            with torch.no_grad(), self:
                output = functional_call(network, state, (x,))
        finally:
            for module, training in modes.items():
                module.training = training
        self.touch(*(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {storage(tensor) for tensor in inputs}
        is_norm = func is _aten.native_batch_norm.default and not args[_TRAINING]
        if is_norm:  # the operation itself takes long to find out its shape
            output = (torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0))
        elif func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
            output = args[0]
        else:
            output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._alive += [*inputs, *outputs]
        for tensor in outputs:
            if storage(tensor) not in before:
                self.create(tensor)
                if func in _FOLDS_NORM:
                    self.folding.add(storage(tensor))
        if is_norm:
            self.norms.append((len(self.touched), storage(inputs[0]), storage(outputs[0])))
        self.touch(*inputs, *outputs)
        return output

    def create(self, tensor: Tensor) -> None:
        self.sizes[storage(tensor)] = tensor.untyped_storage().nbytes()
        self._alive.append(tensor)

    def touch(self, *tensors: Tensor) -> None:
        """An operation that reads or writes these."""
        self.touched.append(frozenset(storage(t) for t in tensors) & self.sizes.keys())

    def peak(self) -> int:
        """Bytes, where each storage lives from the first to the last operation that touches it."""
        home, sizes = self._folded()
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for step, storages in enumerate(self.touched):
            for one in storages:
                first.setdefault(home.get(one, one), step)
                last[home.get(one, one)] = step
        change = [0] * (len(self.touched) + 1)
        for one, step in first.items():
            change[step] += sizes[one]
            change[last[one] + 1] -= sizes[one]
        return max(itertools.accumulate(change))

    def _folded(self) -> tuple[dict[int, int], dict[int, int]]:
        """The storage that a folded batch norm's output shares, and the sizes after that."""
        home: dict[int, int] = {}
        sizes = dict(self.sizes)
        for step, source, target in self.norms:
            shared = home.get(source, source)
            if shared in self.vague:
                sizes[shared] = min(sizes[shared], sizes[target])
            elif source not in self.folding or self._uses(source)[1:] != [step]:
                continue
            home[target] = shared
        return home, sizes

    def _uses(self, one: int) -> list[int]:
        return [step for step, storages in enumerate(self.touched) if one in storages]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
