"""Joint computation against the plain form: the same outputs, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from latency.recipe import recipe
from supernet.joint import AddScaled, Joint, RunningSum, recipe_once, separate
from supernet.mixed_ops.base import PathWeights, Searchable
from supernet.network import Network
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.nasbench201 import NasBench201

SPACES = {
    "nasbench201": NasBench201(widths=(8, 16), num_cells=2, img_size=8),
    "darts": Darts(width=4, num_cells=3, img_size=8),
}


def plain(supernet: Network) -> Network:
    """A copy that computes every candidate of every edge on its own."""
    twin = copy.deepcopy(supernet)
    separate(twin)
    joint = [isinstance(m, Searchable) and m.joint for m in supernet.modules()]
    assert any(joint) and not any(isinstance(m, Searchable) and m.joint for m in twin.modules())
    return twin


def soft(space: SearchSpace, dtype: torch.dtype) -> tuple[dict[str, PathWeights], list[Tensor]]:
    logits = [torch.randn(len(c.options), dtype=dtype, requires_grad=True) for c in space.choices]
    paths = {
        choice.name: PathWeights(tuple(range(len(vector))), torch.softmax(vector, dim=0))
        for choice, vector in zip(space.choices, logits, strict=True)
    }
    return paths, logits


def some(space: SearchSpace, dtype: torch.dtype) -> tuple[dict[str, PathWeights], list[Tensor]]:
    """Two paths here, one there, with factors or without."""
    paths, values = {}, []
    for number, choice in enumerate(space.choices):
        active = tuple(torch.randperm(len(choice.options))[: 1 + number % 2].tolist())
        value = None
        if number % 3:
            value = torch.rand(len(active), dtype=dtype, requires_grad=True)
            values.append(value)
        paths[choice.name] = PathWeights(active, value)
    return paths, values


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("make", [soft, some])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_joint_is_plain(
    space: SearchSpace, make: object, dtype: torch.dtype, training: bool
) -> None:
    torch.manual_seed(0)
    joint = space.build_supernet(num_classes=3).to(dtype).train(training)
    single = plain(joint)
    paths, values = make(space, dtype)  # type: ignore[operator]
    images = torch.randn(4, 3, 8, 8, dtype=dtype)
    found: list[Tensor | None] = []
    expected: list[Tensor | None] = []
    for network, results in ((joint, found), (single, expected)):
        outputs = network(images, paths)
        loss = nn.functional.cross_entropy(outputs, torch.tensor([0, 2, 1, 1]))
        wanted = [*values, *network.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
        # a factor of nothing but zeros has no gradient, or one of zero
        factors = [
            torch.zeros_like(value) if gradient is None else gradient
            for value, gradient in zip(values, gradients, strict=False)
        ]
        results += [outputs.detach(), *factors, *gradients[len(values) :]]
        results += [buffer.clone() for buffer in network.buffers()]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    names = ["outputs", *(f"value {i}" for i in range(len(values)))]
    names += [name for name, _ in joint.named_parameters()]
    names += [name for name, _ in joint.named_buffers()]
    for name, one, other in zip(names, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            error = (one.double() - other.double()).abs().max()
            assert error <= tolerance * max(1.0, other.double().abs().max()), (name, error)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_running_sum_has_the_gradients_of_a_sum(memory_format: torch.memory_format) -> None:
    terms = [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(4)]
    terms = [term.to(memory_format=memory_format).requires_grad_() for term in terms]
    before = [term.detach().clone() for term in terms]
    factors = [torch.rand((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    running = RunningSum(terms[0])
    for term, factor in zip(terms[1:], [None, *factors], strict=True):
        running.add(term, factor)
    a, b, c, d = terms
    plain = a + b + factors[0] * c + factors[1] * d
    assert running.total is not None
    torch.testing.assert_close(running.total, plain)
    outer = torch.randn_like(plain)
    found = torch.autograd.grad((running.total * outer).sum(), [*terms, *factors])
    expected = torch.autograd.grad((plain * outer).sum(), [*terms, *factors])
    torch.testing.assert_close(found, expected)
    for term, value in zip(terms, before, strict=True):
        assert torch.equal(term, value)


def test_a_scaled_addition_can_be_differentiated_twice() -> None:
    total, term = (torch.randn(1, 2, 2, 2, dtype=torch.float64) for _ in range(2))
    factor = torch.rand((), dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (total, term, factor)]

    def add(total: Tensor, term: Tensor, factor: Tensor) -> Tensor:
        return AddScaled.apply(total * 1, term, factor)

    assert torch.autograd.gradcheck(add, inputs) and torch.autograd.gradgradcheck(add, inputs)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_recipes_are_read_once(space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = space.build_supernet(num_classes=3)
    candidates = [m for m in supernet.modules() if isinstance(m, Joint)]
    assert [recipe_once(m) for m in candidates] == [recipe(m) for m in candidates]
    paths, _ = soft(space, torch.float32)
    images = torch.rand(2, 3, 8, 8)
    supernet(images, paths)
    read = list[nn.Module]()
    monkeypatch.setattr("supernet.joint.recipe", lambda m: read.append(m) or recipe(m))
    supernet(images, paths)
    assert not read
    copy.deepcopy(supernet)(images, paths)  # others, which do not pass for these
    assert read
