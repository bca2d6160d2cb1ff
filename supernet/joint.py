"""Candidates that read one input, at several positions, computed together.

Every outgoing edge of a cell's node has the same candidates. One at a time they repeat the same
ReLU and the same pool, and run many small convolutions; together a kind of convolution is one, of
as many output channels as there are edges, its batch norm is one whose scale holds the mixing
weights, and what has no parameters is computed once. The numbers are those of the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

from latency.recipe import recipe
from supernet.mixed_ops.base import MixedOp, PathWeights, Searchable

Factor = Tensor | None  # a scalar; None is one
Factors = Sequence[Factor]
STATISTICS = ("running_mean", "running_var")


_recipes = WeakKeyDictionary[nn.Module, str]()


def recipe_once(module: nn.Module) -> str:
    """The recipe of a module whose settings stay as they are: reading it takes as long as a small
    convolution. Not an attribute of the module, or it would be a part of the recipe."""
    if (found := _recipes.get(module)) is None:
        found = _recipes[module] = recipe(module)
    return found


class Common:
    """What several candidates need of one input, computed once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._found: dict[str, Tensor] = {}

    def once(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in self._found:
            self._found[name] = function(self.x)
        return self._found[name]

    def rectified(self, copies: int = 1) -> Tensor:
        """ReLU(x), so many times side by side on the channels."""
        x = self.once("relu", relu)
        if copies == 1:
            return x
        return self.once(f"relu x{copies}", lambda _: torch.cat([x] * copies, dim=1))


def separate(network: nn.Module) -> None:
    """Have a supernet compute every candidate on its own: what the joint form is compared with."""
    for module in network.modules():
        if isinstance(module, Searchable):
            module.joint = False


class Joint(nn.Module):
    """A candidate that can be computed together with others of its kind."""

    def kind(self) -> Hashable:
        """Equal for candidates that differ in nothing but the values of their parameters."""
        return recipe_once(self)

    @classmethod
    def once(cls, modules: Sequence[Any], common: Common) -> Tensor | None:
        """What each candidate of one kind makes of one input; None where they may differ."""
        return None

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        """What candidates of one kind make of one input, each times its factor.

        Returns:
            Their outputs one after the other, (N, num_modules * C, H, W); None for zeros. It is
            added to in place: a tensor of its own, which its own gradient does not need.
        """
        raise NotImplementedError


class Nothing(Joint):
    """A candidate that carries nothing."""

    def kind(self) -> Hashable:
        return None

    @classmethod
    def jointly(cls, modules: Sequence[Any], common: Common, factors: Factors) -> Tensor | None:
        return None


def add_jointly(
    x: Tensor,
    positions: Sequence[MixedOp],
    paths: Sequence[PathWeights],
    totals: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Add to each total what its position makes of x; None stands for zeros.

    The same as `total + position(x, weights)` for each, but for the order of additions.
    """
    common, sums = Common(x), [RunningSum(total) for total in totals]
    kinds: dict[Hashable, list[tuple[int, nn.Module, Factor]]] = {}
    for place, (position, path) in enumerate(zip(positions, paths, strict=True)):
        for number, index in enumerate(path.active):
            module = position.candidates[position.choice.options[index]]
            factor = None if path.values is None else path.values[number].to(x.dtype)
            kinds.setdefault(_kind(module), []).append((place, module, factor))
    stacks: dict[tuple[int, ...], Tensor] = {}
    for members in kinds.values():
        places, modules, factors = zip(*members, strict=True)
        if isinstance(modules[0], Joint):
            if (term := type(modules[0]).once(modules, common)) is not None:
                for place, factor in zip(places, factors, strict=True):
                    sums[place].add(term, factor)
                continue
            stack = type(modules[0]).jointly(modules, common, factors)
            if stack is not None:
                stacks[places] = stack if places not in stacks else stacks[places].add_(stack)
            continue
        for place, module, factor in members:
            term = common.once(recipe_once(module), module) if _is_plain(module) else module(x)
            sums[place].add(term, factor)
    for places, stack in stacks.items():
        for place, term in zip(places, stack.chunk(len(places), dim=1), strict=True):
            sums[place].add(term, None)
    return [found.total for found in sums]


def _kind(module: nn.Module) -> Hashable:
    return (type(module), module.kind()) if isinstance(module, Joint) else id(module)


def _is_plain(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


class RunningSum:
    """A sum that is added to in place from the second time on: what it was given stays as it is."""

    def __init__(self, total: Tensor | None) -> None:
        self.total, self._is_own = total, False

    def add(self, term: Tensor, factor: Factor) -> None:
        if self.total is None:
            self.total = term if factor is None else factor * term
            self._is_own = factor is not None
            return
        if not self._is_own:
            self.total, self._is_own = _sum(self.total, term, factor), True
        elif factor is None:
            self.total = self.total.add_(term)
        else:
            self.total = AddScaled.apply(self.total, term, factor)


def _sum(total: Tensor, term: Tensor, factor: Factor) -> Tensor:
    return total + term if factor is None else torch.addcmul(total, term, factor)


class AddScaled(torch.autograd.Function):
    """total += factor * term. The factor's gradient is one dot product; PyTorch's own would write
    the product of all elements first."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, term: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(term, factor)
        ctx.mark_dirty(total)
        return total.addcmul_(term, factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        term, factor = ctx.saved_tensors
        _, for_term, for_factor = ctx.needs_input_grad
        return (
            gradient,
            gradient * factor if for_term else None,
            _dot(gradient, term) if for_factor else None,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of all elements, in the order they have in memory where they have the same."""
    if a.is_contiguous(memory_format=torch.channels_last):
        a, b = (t.permute(0, 2, 3, 1) for t in (a, b))
    return torch.dot(a.reshape(-1), b.reshape(-1).to(a.dtype))


def joint_norm(y: Tensor, norms: Sequence[nn.BatchNorm2d], factors: Factors) -> Tensor:
    """Batch norms of equal settings, side by side on the channels, each times its factor.

    Args:
        y: (N, num_norms * C, H, W).
    """
    first, width = norms[0], norms[0].num_features
    scale = bias = None
    if first.affine:
        scale, bias = (torch.cat([getattr(n, name) for n in norms]) for name in ("weight", "bias"))
    if any(factor is not None for factor in factors):
        ones = y.new_ones(())
        each = torch.stack([ones if factor is None else factor for factor in factors])
        each = each.to(first.running_mean).repeat_interleave(width)
        scale = each if scale is None else scale * each
        bias = None if bias is None else bias * each
    mean, var = (torch.cat([getattr(n, name) for n in norms]) for name in STATISTICS)
    assert first.momentum is not None
    y = batch_norm(y, mean, var, scale, bias, first.training, first.momentum, first.eps)
    if first.training:
        with torch.no_grad():
            for name, values in zip(STATISTICS, (mean, var), strict=True):
                torch._foreach_copy_([getattr(n, name) for n in norms], values.split(width))
            counts = [norm.num_batches_tracked for norm in norms]
            torch._foreach_add_([count for count in counts if count is not None], 1)
    return y


def norm_once(x: Tensor, norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """Batch norms without scale and shift, in training, of one input: all make the same of it."""
    first = norms[0]
    mean, var = (torch.zeros_like(getattr(first, name)) for name in STATISTICS)
    y = batch_norm(x, mean, var, None, None, True, 1.0, first.eps)  # leaves those of the batch
    with torch.no_grad():
        counts: list[Any] = [n.num_batches_tracked for n in norms]
        torch._foreach_add_(counts, 1)
        for name, value in zip(STATISTICS, (mean, var), strict=True):
            running = [getattr(n, name) for n in norms]
            share = first.momentum  # None: the mean over all batches so far
            shares = [1 / count if share is None else share for count in counts]
            for own, weight in zip(running, shares, strict=True):
                own.lerp_(value, float(weight))
    return y
