import math

import pytest
import torch

from supernet.mixed_ops.beta_softmax import BetaSoftmax

LOGITS = {
    "a": torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True),
    "b": torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True),
}


def test_the_penalty_is_the_mean_smooth_maximum_and_grows() -> None:
    smooth = [math.log(math.exp(0.3) + math.exp(-1.2)), math.log(math.exp(2.0) + 1)]
    for progress in (0.0, 0.25, 1.0):
        penalty = BetaSoftmax(weight=8.0).penalty(LOGITS, progress)
        assert penalty.item() == pytest.approx(8.0 * progress * sum(smooth) / 2)


def test_its_gradient_holds_every_logit_down_by_its_probability() -> None:
    (gradient,) = torch.autograd.grad(BetaSoftmax(weight=8.0).penalty(LOGITS, 0.5), LOGITS["b"])
    p = math.exp(2.0) / (math.exp(2.0) + 1)
    torch.testing.assert_close(gradient.tolist(), [2.0 * p, 2.0 * (1 - p)])


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight must be at least 0; got -1"):
        BetaSoftmax(weight=-1)
