from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.mixed_ops.base import PathWeights
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.sigmoid import Sigmoid
from supernet.strategies.proxyless_reinforce import ProxylessReinforce
from supernet.strategies.state import SearchState

SGD = {"opt": "momentum", "lr": 0.1, "momentum": 0.9}
ADAM = {"opt": "adam", "lr": 0.05, "betas": (0.0, 0.999)}


def test_the_gradient_is_that_of_the_expected_loss(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the derivative of sum_a p(a) L(a) over all architectures, L from a made-up table."""
    problem = make_problem(BinaryGate())
    state = SearchState(problem, 8, SGD, ADAM, 0.5, torch.contiguous_format)
    state.parameters.double()
    logits = dict(state.parameters().items())
    generator = torch.Generator().manual_seed(3)
    tables = {n: torch.rand(len(v), generator=generator).double() for n, v in logits.items()}

    def loss(options: dict[str, int]) -> Tensor:
        first, second = (tables[name][index] for name, index in options.items())
        return 3 + first * second + first

    monkeypatch.setattr(ProxylessReinforce, "loss_of", lambda _, s, o, x, y: (loss(o), x))
    strategy = make_strategy(ProxylessReinforce, num_samples=4)
    expected_loss = torch.zeros(())
    for pair in itertools.product(*(range(len(v)) for v in logits.values())):
        options = dict(zip(logits, pair, strict=True))
        p = [torch.softmax(v, dim=0)[options[name]] for name, v in logits.items()]
        expected_loss = expected_loss + p[0] * p[1] * loss(options)
    expected = torch.autograd.grad(expected_loss, list(logits.values()))
    found, values = [], []
    for _ in range(1500):
        sample = strategy.sample(state, logits, 0.5)
        total, _ = strategy.task_loss(state, sample, torch.zeros(1), torch.zeros(1))
        found.append(torch.cat(torch.autograd.grad(total, list(logits.values()))))
        values.append(total.detach())
    gradients = torch.stack(found)
    deviation = (gradients.mean(0) - torch.cat(expected)) / (gradients.std(0) / 1500**0.5)
    assert deviation.abs().max() < 4
    means = torch.stack(values)
    assert (means.mean() - expected_loss).abs() < 4 * means.std() / 1500**0.5


def test_what_all_losses_have_in_common_leaves_the_gradient(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The baseline takes it away from every single estimate, not only from their mean."""
    problem = make_problem(BinaryGate())
    strategy, found = make_strategy(ProxylessReinforce, num_samples=3), []
    for common in (0.0, 1000.0):
        state = SearchState(problem, 8, SGD, ADAM, 0.5, torch.contiguous_format)
        state.parameters.double()
        logits = dict(state.parameters().items())

        def loss(_: object, s: object, options: Any, *rest: Tensor, c: float = common) -> Any:
            return torch.tensor(c + sum(options.values()), dtype=torch.float64), rest[0]

        monkeypatch.setattr(ProxylessReinforce, "loss_of", loss)
        gradient = torch.zeros(5, dtype=torch.float64)
        for _ in range(4):
            sample = strategy.sample(state, logits, 0.5)
            total, _ = strategy.task_loss(state, sample, torch.zeros(1), torch.zeros(1))
            one = torch.cat(torch.autograd.grad(total, list(logits.values())))
            gradient += one.abs()
        found.append(gradient)
    assert found[0].max() > 0.01
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_a_sample_is_judged_by_its_own_path(
    make_problem: Callable[..., Any], make_strategy: Callable[..., Any]
) -> None:
    problem = make_problem(BinaryGate())
    state = SearchState(problem, 8, SGD, ADAM, 0.5, torch.contiguous_format)
    images, labels = state.arch_stream.next()
    first, second = (choice.name for choice in problem.space.choices)
    problem.supernet.eval()
    strategy, losses = make_strategy(ProxylessReinforce), []
    for pair in itertools.product(range(2), range(3)):
        options = dict(zip((first, second), pair, strict=True))
        loss, outputs = strategy.loss_of(state, options, images, labels)
        weights = {name: torch.zeros(len(v)) for name, v in state.parameters().items()}
        for name, index in options.items():
            weights[name][index] = 1.0  # all candidates run, one counts
        paths = {n: PathWeights(tuple(range(len(v))), v) for n, v in weights.items()}
        expected = problem.supernet(images, paths)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
        assert loss.item() == pytest.approx(cross_entropy(expected, labels).item(), rel=1e-4)
        assert not loss.requires_grad
        losses.append(loss.item())
    assert len(set(losses)) == 6


def test_a_search_learns_which_option_is_best(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., Any],
    make_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loss(self: object, state: SearchState, options: Any, x: Tensor, y: Tensor) -> Any:
        return torch.tensor(float(sum(index != 1 for index in options.values()))), x.new_zeros(
            8, 10
        )

    monkeypatch.setattr(ProxylessReinforce, "loss_of", loss)
    problem = make_problem(BinaryGate(), share=1.0)
    strategy = make_strategy(
        ProxylessReinforce, epochs=12, batch_size=8,
        arch_optimizer={"opt": "adam", "lr": 0.2, "betas": (0.0, 0.999), "weight_decay": 0.0},
    )  # fmt: skip
    answer = strategy.search(problem, make_run())
    best = answer.best(None)
    assert all(best[c.name] == c.options[1] for c in problem.space.choices)


def test_what_cannot_work_is_refused(
    make_problem: Callable[..., Any],
    make_strategy: Callable[..., Any],
    make_run: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match="num_samples must be 2 or more; got 1"):
        make_strategy(ProxylessReinforce, num_samples=1)
    with pytest.raises(ValueError, match="needs logits, and OneShot has none"):
        make_strategy(ProxylessReinforce).search(make_problem(OneShot()), make_run())
    with pytest.raises(ValueError, match="Sigmoid does not have: its options do not compete"):
        make_strategy(ProxylessReinforce).search(make_problem(Sigmoid()), make_run())
