import math

import pytest
import torch

from supernet.objective import Additive, Budget, FBNet, Product, Proxyless, TaskOnly

RANGE = (2.0, 10.0)


def value(objective, task: float, cost: float) -> float:
    return objective.loss(torch.tensor(task), torch.tensor(cost, dtype=torch.float64)).item()


def test_none_ignores_the_cost() -> None:
    assert value(TaskOnly(), 1.5, 7.0) == 1.5


def test_additive() -> None:
    assert value(Additive(lambda2=0.1), 1.5, 7.0) == pytest.approx(1.5 + 0.7)


def test_lambda1_is_twice_the_weight_decay() -> None:
    """SGD with decay d adds d w to the gradient, and the gradient of lambda1 ||w||^2 is
    2 lambda1 w."""
    objective = Additive(lambda2=0.1, lambda1=0.05)
    w = torch.tensor([3.0], requires_grad=True)
    assert objective.weight_decay is not None
    optimizer = torch.optim.SGD([w], lr=1.0, weight_decay=objective.weight_decay)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == pytest.approx(3.0 - 2 * 0.05 * 3.0)
    assert Additive(lambda2=0.1).weight_decay is None


def test_proxyless_has_the_power_on_the_ratio_of_logarithms() -> None:
    objective = Proxyless(ref=4.0)
    expected = 1.5 * 0.2 * (math.log(7.0) / math.log(4.0)) ** 0.3
    assert value(objective, 1.5, 7.0) == pytest.approx(expected)
    in_us = Proxyless(ref=4000.0, unit="us")
    expected = 1.5 * 0.2 * (math.log(7000.0) / math.log(4000.0)) ** 0.3
    assert value(in_us, 1.5, 7.0) == pytest.approx(expected)


def test_fbnet_has_the_power_outside_the_logarithm() -> None:
    expected = 1.5 * 0.2 * math.log(7000.0) ** 0.6
    assert value(FBNet(), 1.5, 7.0) == pytest.approx(expected)
    assert value(FBNet(unit="ms"), 1.5, 7.0) == pytest.approx(1.5 * 0.2 * math.log(7.0) ** 0.6)


@pytest.mark.parametrize("objective", [FBNet(unit="ms"), Proxyless(ref=2.0)])
@pytest.mark.parametrize("cost", [1.0, 0.4])
def test_a_logarithm_at_or_below_one_unit_is_refused(objective, cost: float) -> None:
    with pytest.raises(ValueError, match="ms is not positive.*objective.unit=us"):
        value(objective, 1.5, cost)
    with pytest.raises(ValueError, match="objective.unit=us"):
        objective.prepare((cost, 9.0), "ms")


def test_a_reference_at_or_below_one_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive"):
        Proxyless(ref=1.0)


def test_units_are_named() -> None:
    with pytest.raises(ValueError, match="'s' is unknown; valid: ms, us"):
        FBNet(unit="s")


def test_budget_is_an_augmented_lagrangian() -> None:
    objective = Budget(budget_ms=5.0)
    objective.prepare(RANGE, "ms")
    assert value(objective, 1.5, 4.0) == pytest.approx(1.5)  # met, and nothing learned yet
    assert value(objective, 1.5, 7.0) == pytest.approx(1.5 + 0.5 * 0.4**2)
    objective.load_state_dict({"multiplier": 0.8, "multipliers": {}, "used": 0.0})
    cost = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    objective.loss(torch.tensor(1.5), cost).backward()
    assert cost.grad is not None
    assert cost.grad.item() == pytest.approx((0.8 + 0.4) / 5.0)


def test_multiplier_rises_above_the_budget_and_falls_to_zero_below() -> None:
    objective = Budget(budget_ms=5.0, ascent=10.0)
    objective.num_steps = 100
    objective.update(7.5)
    assert objective.multiplier == pytest.approx(0.1 * 0.5)
    for _ in range(10):
        objective.update(2.5)
    assert objective.multiplier == 0.0
    objective.update(10.0)
    assert objective.state_dict() == {
        "multiplier": pytest.approx(0.1), "multipliers": {}, "used": pytest.approx(2.0),
    }  # fmt: skip


def test_dual_ascent_settles_on_the_constrained_optimum() -> None:
    """min -log p_0 over two options that cost 10 and 2, mean at most 5: p_0 = 3/8 exactly."""
    objective = Budget(budget_ms=5.0, ascent=30.0)
    objective.prepare(RANGE, "ms")
    objective.num_steps = 2000
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(2000):
        p = torch.softmax(logits, dim=0)
        cost = p @ torch.tensor([10.0, 2.0], dtype=torch.float64)
        optimizer.zero_grad()
        objective.loss(-p[0].log(), cost).backward()
        optimizer.step()
        objective.update(cost.item())
    assert torch.softmax(logits, dim=0)[0].item() == pytest.approx(3 / 8, abs=0.01)


def test_each_limit_has_a_term_and_a_multiplier_of_its_own() -> None:
    limits = {"macs": 8.0, "params": 4.0, "energy": None}
    objective = Budget(budget_ms=5.0, ascent=10.0, limits=limits)
    assert objective.limits == {"macs": 8.0, "params": 4.0}
    objective.num_steps = 100
    values = {"macs": 12.0, "params": 3.0}
    for _ in range(2):
        objective.update(7.5, values)
    assert objective.multiplier == pytest.approx(2 * 0.1 * 0.5)
    assert objective.multipliers == {"macs": pytest.approx(2 * 0.1 * 0.5), "params": 0.0}
    state = objective.state_dict()
    objective = Budget(budget_ms=5.0, limits=limits)
    objective.load_state_dict(state)
    limited = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in values.items()
    }
    loss = objective.loss(torch.tensor(1.5), torch.tensor(7.0, dtype=torch.float64), limited)
    by_hand = 1.5 + 0.5 * (0.5**2 - 0.1**2) + 0.5 * (0.6**2 - 0.1**2) + 0.0
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    assert limited["macs"].grad.item() == pytest.approx(0.6 / 8.0)
    assert limited["params"].grad.item() == 0.0


def test_dual_ascent_settles_within_a_budget_and_a_limit() -> None:
    """max sum_i log p_i over three options, with E <= 2 and p_1 <= 0.1 of the second cost.

    Costs (3, 2, 1) and (0, 1, 0): the optimum has p_1 = 0.1 and p_0 = p_2, where E is 2.
    """
    costs = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    objective = Budget(budget_ms=2.0, ascent=30.0, limits={"macs": 0.1})
    objective.num_steps = 2000
    logits = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(2000):
        p = torch.softmax(logits, dim=0)
        latency, macs = costs @ p
        optimizer.zero_grad()
        objective.loss(-p.log().sum(), latency, {"macs": macs}).backward()
        optimizer.step()
        objective.update(latency.item(), {"macs": macs.item()})
    assert torch.softmax(logits, dim=0).tolist() == pytest.approx([0.45, 0.1, 0.45], abs=0.01)


def test_objectives_without_multipliers_let_limits_bind_the_derivation_alone() -> None:
    objective = Additive(lambda2=0.1, limits={"macs": 8.0})
    loss = objective.loss(torch.tensor(1.5), torch.tensor(7.0), {"macs": torch.tensor(99.0)})
    assert loss.item() == pytest.approx(2.2)
    objective.update(7.0, {"macs": 99.0})
    assert objective.multipliers == {} and objective.limits == {"macs": 8.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a budget"),
        ({"budget_ms": 3.0, "budget_share": 0.5}, "budget_ms and budget_share"),
        ({"budget": 3.0}, "use objective.budget_ms"),
        ({"budget_ms": 3.0, "cost": "macs"}, "use objective.budget"),
        ({"budget_ms": -1.0}, "positive.*-1.0"),
        ({"budget_ms": float("nan")}, "positive"),
        ({"budget_ms": 3.0, "cost": "joules"}, "'joules' is unknown; valid: latency, .*energy"),
        ({"budget_ms": 3.0, "limits": {"mac": 3.0}}, "limits.mac is unknown.*macs.*peak_memory"),
        ({"budget_ms": 3.0, "limits": {"latency": 3.0}}, "latency is objective.cost already"),
        ({"budget_ms": 3.0, "limits": {"macs": 0.0}}, "objective.limits.macs must be a positive"),
    ],
)
def test_bad_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def test_an_unreachable_budget_is_refused_before_training_with_the_range() -> None:
    with pytest.raises(ValueError, match="1.5 ms cannot be met.*from 2 to 10 ms"):
        Budget(budget_ms=1.5).prepare(RANGE, "ms")


def test_a_share_is_of_the_largest() -> None:
    objective = Budget(budget_share=0.6)
    objective.prepare(RANGE, "ms")
    assert objective.budget == pytest.approx(6.0)


def test_ranking_goes_by_accuracy_unless_the_loss_has_a_price() -> None:
    assert TaskOnly().rank(90.0, 2.0, 9.0) < TaskOnly().rank(80.0, 1.0, 1.0)
    assert Additive(lambda2=1.0).rank(90.0, 2.0, 9.0) > Additive(lambda2=1.0).rank(80.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("alpha", "beta", "cost", "expected"),
    [
        (-0.07, -0.07, 40.0, 80 * (40 / 20) ** -0.07),
        (-0.07, -0.07, 10.0, 80 * (10 / 20) ** -0.07),
        (0.0, -1.0, 10.0, 80.0),
        (0.0, -1.0, 20.0, 80.0),
        (0.0, -1.0, 40.0, 40.0),
    ],
)
def test_the_reward_of_mnasnet(alpha: float, beta: float, cost: float, expected: float) -> None:
    objective = Product(target=20.0, alpha=alpha, beta=beta)
    assert -objective.rank(80.0, 1.0, cost) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"target": None}, "target=None must be a positive"), ({"target": 0.0}, "target=0.0 must"),
     ({"beta": 1.0}, "beta=1.0 must be at most 0")],
)  # fmt: skip
def test_a_reward_without_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Product(**{"target": 2.0, "alpha": 0.0, "beta": -1.0, **changes})
