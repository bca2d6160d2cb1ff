import math

import torch

from supernet.mixed_ops.softmax import Softmax

LOGITS = {"a": torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)}


def hand_softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def test_weights_are_the_softmax_of_all_candidates() -> None:
    sample = Softmax().for_architecture_step(LOGITS, torch.Generator(), 0.5)
    path = sample.weights["a"]
    assert path.active == (0, 1, 2) and path.values is not None
    torch.testing.assert_close(path.values.tolist(), hand_softmax([0.3, -1.2, 2.0]))
    torch.testing.assert_close(sample.cost_weights["a"].tolist(), hand_softmax([0.3, -1.2, 2.0]))


def test_gradient_of_the_mixture() -> None:
    """d/da_i sum_j p_j o_j = p_i (o_i - sum_j p_j o_j)."""
    outputs = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    path = Softmax().for_architecture_step(LOGITS, torch.Generator(), 0.5).weights["a"]
    assert path.values is not None
    (gradient,) = torch.autograd.grad((path.values * outputs).sum(), LOGITS["a"])
    p = hand_softmax([0.3, -1.2, 2.0])
    mean = sum(a * b for a, b in zip(p, outputs.tolist(), strict=True))
    expected = [p[i] * (outputs[i].item() - mean) for i in range(3)]
    torch.testing.assert_close(gradient.tolist(), expected)


def test_weight_step_does_not_reach_the_logits() -> None:
    path = Softmax().for_weight_step(LOGITS, torch.Generator(), 0.5)["a"]
    assert path.values is not None and not path.values.requires_grad
    torch.testing.assert_close(path.values.tolist(), hand_softmax([0.3, -1.2, 2.0]))
