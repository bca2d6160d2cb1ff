from __future__ import annotations

import math

import pytest
import torch

from supernet.mixed_ops.gumbel import Gumbel

LOGITS = {"a": torch.tensor([0.3, -1.2, 1.0], dtype=torch.float64, requires_grad=True)}


def test_hard_samples_follow_the_probabilities() -> None:
    """The largest of log p + Gumbel noise is distributed as p, at any temperature."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3, dtype=torch.float64)
    for step in range(4000):
        path = Gumbel().for_weight_step(LOGITS, generator, progress=step / 4000)["a"]
        assert len(path.active) == 1 and path.values is None
        counts[path.active[0]] += 1
    p = torch.softmax(LOGITS["a"].detach(), dim=0)
    deviations = (counts - 4000 * p) / (4000 * p * (1 - p)).sqrt()
    assert deviations.abs().max() < 3.5


@pytest.mark.parametrize("progress", [0.0, 0.4])
def test_the_gradient_of_a_hard_sample_is_that_of_its_soft_weight(progress: float) -> None:
    """d h_i / d a_j = h_i (delta_ij - h_j) / tau; h is the soft sample of the same noise."""
    hard, soft = Gumbel(hard=True), Gumbel(hard=False)
    for seed in range(20):
        sample, twin = (
            relaxation.for_architecture_step(
                LOGITS, torch.Generator().manual_seed(seed), progress
            ).weights["a"]
            for relaxation in (hard, soft)
        )
        assert sample.values is not None and twin.values is not None
        assert sample.values.item() == 1.0 and twin.active == (0, 1, 2)
        h = twin.values.detach()
        assert math.isclose(h.sum().item(), 1.0) and sample.active == (int(h.argmax()),)
        (gradient,) = torch.autograd.grad(3.0 * sample.values.sum(), LOGITS["a"])
        i, tau = sample.active[0], hard.temperature(progress)
        expected = [3.0 * h[i] * (float(i == j) - h[j]) / tau for j in range(3)]
        torch.testing.assert_close(gradient, torch.stack(expected))


def test_temperatures() -> None:
    linear = Gumbel(tau=10, tau_end=0.1)
    assert [linear.temperature(p) for p in (0, 0.5, 1)] == pytest.approx([10, 5.05, 0.1])
    fbnet = Gumbel(hard=False, tau=5, tau_end=5 * 0.956**90, schedule="exponential")
    assert fbnet.temperature(30 / 90) == pytest.approx(5 * 0.956**30)


def test_costs_see_the_probabilities() -> None:
    sample = Gumbel().for_architecture_step(LOGITS, torch.Generator(), 0.5)
    torch.testing.assert_close(sample.cost_weights["a"], torch.softmax(LOGITS["a"], dim=0))


def test_weight_steps_do_not_reach_the_logits() -> None:
    path = Gumbel(hard=False).for_weight_step(LOGITS, torch.Generator(), 0.5)["a"]
    assert path.values is not None and not path.values.requires_grad


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"above 0; got 10.0 and 0"):
        Gumbel(tau_end=0)
    with pytest.raises(ValueError, match="'cosine' is unknown; valid: linear, exponential"):
        Gumbel(schedule="cosine")
