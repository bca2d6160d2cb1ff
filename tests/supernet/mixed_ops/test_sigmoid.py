import math

import pytest
import torch

from supernet.mixed_ops.sigmoid import Sigmoid

VALUES = [0.3, -1.2, 2.0]
LOGITS = {"a": torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)}
GATES = [1 / (1 + math.exp(-v)) for v in VALUES]


def test_candidates_do_not_compete() -> None:
    path = Sigmoid().for_architecture_step(LOGITS, torch.Generator(), 0.5).weights["a"]
    assert path.active == (0, 1, 2) and path.values is not None
    torch.testing.assert_close(path.values.tolist(), GATES)
    (gradient,) = torch.autograd.grad(path.values[0], LOGITS["a"])
    torch.testing.assert_close(gradient.tolist(), [GATES[0] * (1 - GATES[0]), 0.0, 0.0])


def test_the_zero_one_loss() -> None:
    expected = -4.0 / 3 * sum((gate - 0.5) ** 2 for gate in GATES)
    assert Sigmoid(zero_one=4.0).penalty(LOGITS, 0.5).item() == pytest.approx(expected)


def test_scores_are_log_sigmoids_and_costs_are_shared_out() -> None:
    torch.testing.assert_close(
        Sigmoid().scores(LOGITS)["a"].tolist(), [math.log(gate) for gate in GATES]
    )
    sample = Sigmoid().for_architecture_step(LOGITS, torch.Generator(), 0.5)
    torch.testing.assert_close(
        sample.cost_weights["a"].tolist(), [gate / sum(GATES) for gate in GATES]
    )


def test_weight_steps_do_not_reach_the_logits() -> None:
    path = Sigmoid().for_weight_step(LOGITS, torch.Generator(), 0.5)["a"]
    assert path.values is not None and not path.values.requires_grad


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="zero_one must be at least 0; got -1"):
        Sigmoid(zero_one=-1)
