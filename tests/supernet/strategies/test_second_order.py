from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from supernet.mixed_ops.softmax import Softmax
from supernet.strategies import second_order
from supernet.strategies.second_order import SecondOrder
from supernet.strategies.state import SearchState

SGD = {"opt": "momentum", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"opt": "adam", "lr": 0.01}


def make_state(make_problem: Callable[..., Any], warm: int) -> SearchState:
    """In float64, after some steps of the weights, so that there is momentum."""
    problem = make_problem(Softmax())
    state = SearchState(problem, 8, SGD, ADAM, 0.3, torch.contiguous_format)
    problem.supernet.double().train()
    state.parameters.double()
    for _ in range(warm):
        images, labels = state.weight_stream.next()
        weights = Softmax().for_weight_step(state.parameters(), state.generator, 0.0)
        state.weight_optimizer.zero_grad()
        cross_entropy(problem.supernet(images.double(), weights), labels).backward()
        state.weight_optimizer.step()
    state.weight_optimizer.zero_grad()
    return state


def exact(state: SearchState, train: Any, images: torch.Tensor, labels: torch.Tensor) -> list[Any]:
    """d/da L_val(w - xi (grad L_train(w, a) + decay w + momentum m), a), by double backward."""
    supernet = state.problem.supernet
    logits = state.parameters()
    weights = Softmax().for_architecture_step(logits, state.generator, 0.5).weights
    named = dict(supernet.named_parameters())
    loss = cross_entropy(functional_call(supernet, named, (train[0].double(), weights)), train[1])
    gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    moved = {}
    for (name, w), gradient in zip(named.items(), gradients, strict=True):
        decay = next(
            group["weight_decay"]
            for group in state.weight_optimizer.param_groups
            if any(w is parameter for parameter in group["params"])
        )
        step = gradient + decay * w.detach()
        if (state_of := state.weight_optimizer.state.get(w)) is not None:
            step = step + 0.9 * state_of["momentum_buffer"]
        moved[name] = w.detach() - 0.2 * step
    outputs = functional_call(supernet, moved, (images, weights))
    return list(torch.autograd.grad(cross_entropy(outputs, labels), list(logits.values())))


@pytest.mark.parametrize("warm", [0, 3])
def test_the_gradient_is_that_through_a_virtual_step(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., SecondOrder],
    monkeypatch: pytest.MonkeyPatch,
    warm: int,
) -> None:
    monkeypatch.setattr(second_order, "PERTURBATION", 1e-5)  # exact in float64
    state = make_state(make_problem, warm)
    strategy = make_strategy(SecondOrder)
    images, labels = state.arch_stream.next()
    images = images.double()
    train = state.weight_stream.next()
    monkeypatch.setattr(state.weight_stream, "next", lambda: (train[0].double(), train[1]))
    before = {name: t.clone() for name, t in state.problem.supernet.state_dict().items()}
    sample = Softmax().for_architecture_step(state.parameters(), state.generator, 0.5)
    loss, outputs = strategy.task_loss(state, sample, images, labels)
    logits = list(state.parameters().values())
    found = torch.autograd.grad(loss, logits)
    for name, tensor in state.problem.supernet.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    state.problem.supernet.requires_grad_(True)
    for one, other in zip(found, exact(state, train, images, labels), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    assert outputs.shape == (8, 10)
