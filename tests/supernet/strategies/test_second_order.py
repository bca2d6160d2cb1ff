from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
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
    monkeypatch.setattr(state.weight_stream, "peek", lambda: (train[0].double(), train[1]))
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


def test_the_weights_move_by_a_hundredth_whatever_the_gradient(
    make_problem: Callable[..., Any], make_strategy: Callable[..., SecondOrder]
) -> None:
    """Section 2.3: eps = 0.01 / norm, so that the differences are taken 0.01 from the weights."""
    state = make_state(make_problem, 1)
    supernet = state.problem.supernet
    with torch.no_grad():
        supernet.get_classifier().weight.mul_(100.0)  # what makes gradients large
    at: list[torch.Tensor] = []  # the weights of each pass
    supernet.register_forward_pre_hook(
        lambda *_: at.append(torch.cat([p.detach().flatten() for p in supernet.parameters()]))
    )
    images, labels = state.arch_stream.next()
    train = state.weight_stream.next()
    state.weight_stream.peek = lambda: (train[0].double(), train[1])
    sample = Softmax().for_architecture_step(state.parameters(), state.generator, 0.5)
    make_strategy(SecondOrder).task_loss(state, sample, images.double(), labels)
    before, virtual, above, below = at
    torch.testing.assert_close(above - before, before - below, rtol=1e-6, atol=1e-12)
    assert (above - before).norm().item() == pytest.approx(0.01, rel=1e-6)
    gradient = _gradient_at(state, virtual, sample, images.double(), labels)
    assert gradient.norm() > 20
    torch.testing.assert_close(
        above - before, 0.01 * gradient / gradient.norm(), rtol=1e-4, atol=1e-9
    )


def _gradient_at(
    state: SearchState, flat: torch.Tensor, sample: Any, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Of the loss in all weights, one after the other."""
    supernet = state.problem.supernet.requires_grad_(True)
    named = dict(supernet.named_parameters())
    pieces = flat.split([p.numel() for p in named.values()])
    moved = {
        name: piece.view_as(p).requires_grad_()
        for (name, p), piece in zip(named.items(), pieces, strict=True)
    }
    loss = cross_entropy(functional_call(supernet, moved, (images, sample.weights)), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(moved.values()))])


class Served:
    """A stream that remembers the images it served."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.served = stream, list[tuple[str, torch.Tensor]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def next(self) -> Any:
        self.served.append(("next", (batch := self.stream.next())[0]))
        return batch

    def peek(self) -> Any:
        self.served.append(("peek", (batch := self.stream.peek())[0]))
        return batch


def test_the_virtual_step_takes_the_batch_of_the_step_to_come(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., SecondOrder],
    make_run: Callable[..., Any],
) -> None:
    """So an epoch, of five batches here, is one pass over the weight half."""
    streams: list[Any] = []

    class Watching(SecondOrder):
        def train(self, state: SearchState, run: Any) -> None:
            state.weight_stream = Served(state.weight_stream)  # type: ignore[assignment]
            streams.append(state.weight_stream)
            super().train(state, run)

    strategy = make_strategy(Watching, epochs=2, warmup_epochs=1, weight_optimizer=SGD)
    strategy.search(make_problem(Softmax()), make_run())
    served = streams[0].served
    assert [name for name, _ in served] == ["next"] * 5 + ["next", "peek"] * 5
    for (_, peeked), (_, taken) in zip(served[6:-1:2], served[7::2], strict=True):
        assert torch.equal(peeked, taken)
    assert streams[0].state_dict() == {"epoch": 2, "position": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": "sgd"}, "got nesterov=True; set strategy.weight_optimizer.opt=momentum"),
        ({"opt": "adam", "momentum": 0.9}, "makes a Adam; set it to momentum"),
        ({"dampening": 0.5}, "got dampening=0.5; .* leave dampening at 0"),
    ],
)
def test_an_optimizer_of_another_step_is_refused(
    changes: dict[str, Any], message: str, make_problem: Callable[..., Any],
    make_strategy: Callable[..., SecondOrder], make_run: Callable[..., Any],
) -> None:  # fmt: skip
    strategy = make_strategy(SecondOrder, weight_optimizer={**SGD, **changes})
    with pytest.raises(ValueError, match=message):
        strategy.search(make_problem(Softmax()), make_run())


def test_the_optimizer_of_the_configuration_is_accepted(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., SecondOrder],
    make_run: Callable[..., Any],
) -> None:
    with initialize_config_module("supernet_conf", version_base="1.3"):
        config = compose("search", ["strategy=second_order"])
    given: Any = OmegaConf.to_container(config.strategy.weight_optimizer)
    assert given["momentum"] == 0.9 and given["weight_decay"] > 0
    strategy = make_strategy(SecondOrder, epochs=1, warmup_epochs=0, weight_optimizer=given)
    strategy.search(make_problem(Softmax()), make_run())
