"""The loss of an architecture step: task loss and cost term, and the budget derivation obeys."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

UNITS = {"ms": 1.0, "us": 1e3}
COSTS = ("latency", "macs", "params", "energy")
LIMITS = (*COSTS, "peak_memory")
_NONE: Mapping[str, Any] = MappingProxyType({})


class Objective(ABC):
    """A task loss and an additive cost in one number.

    At most one of the three budgets is given; whatever the loss, derivation obeys it and the
    limits.

    Args:
        cost: which additive cost: latency (ms), macs or params (counts), or energy (mJ).
        budget_ms: largest latency of the derived network.
        budget: largest cost where the cost is not a latency.
        budget_share: budget as a share of the dearest valid architecture's cost.
        limits: largest values of other costs, by name, peak_memory (bytes) among them; None is no
            limit.

    Attributes:
        differentiable: whether there is a loss for architecture steps.
    """

    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        cost: str = "latency",
        budget_ms: float | None = None,
        budget: float | None = None,
        budget_share: float | None = None,
        limits: Mapping[str, float | None] = _NONE,
    ) -> None:
        if cost not in COSTS:
            raise ValueError(f"objective.cost={cost!r} is unknown; valid: {', '.join(COSTS)}")
        given = {"budget_ms": budget_ms, "budget": budget, "budget_share": budget_share}
        set_ = {name: value for name, value in given.items() if value is not None}
        if len(set_) > 1:
            raise ValueError(f"give one budget, not {' and '.join(set_)}")
        if budget_ms is not None and cost != "latency":
            raise ValueError(f"objective.budget_ms is for latency; for {cost} use objective.budget")
        if budget is not None and cost == "latency":
            raise ValueError("objective.budget is not for latency; use objective.budget_ms")
        self.limits = {name: value for name, value in limits.items() if value is not None}
        for name in self.limits:
            if name not in LIMITS:
                raise ValueError(
                    f"objective.limits.{name} is unknown; valid: {', '.join(LIMITS)}"
                )
            if name == cost:
                own = "budget_ms" if cost == "latency" else "budget"
                raise ValueError(
                    f"objective.limits.{name}: {name} is objective.cost already; "
                    f"limit it with objective.{own}"
                )
        for name, value in {**set_, **{f"limits.{k}": v for k, v in self.limits.items()}}.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"objective.{name} must be a positive number; got {value}")
        self.cost = cost
        self.share = budget_share
        self.budget = budget_ms if budget_ms is not None else budget
        self.weight_decay: float | None = None  # of the supernet's weights; None: the optimizer's
        self.num_steps = 1  # architecture steps of the whole search; the strategy sets it

    def prepare(self, reachable: tuple[float, float], unit: str) -> None:
        """Settle the budget before training.

        Args:
            reachable: cost of the cheapest and of the dearest valid architecture.
            unit: of the cost, for messages.

        Raises:
            ValueError: the budget is outside the reachable range.
        """
        low, high = reachable
        if self.share is not None:
            self.budget = self.share * high
        if self.budget is None:
            return
        share = f" (budget_share {self.share} of {high:.6g})" if self.share else ""
        check_reachable(self.cost, self.budget, reachable, unit, share)

    @abstractmethod
    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        """Scalars in, scalar out.

        Args:
            cost: expected cost in its own unit.
            limited: by name, the expected costs that are additive and limited.
        """

    def update(self, cost: float, limited: Mapping[str, float] = _NONE) -> None:  # noqa: B027
        """Learn from the expected costs after an architecture step; by default nothing."""

    def rank(self, accuracy: float, task_loss: float, cost: float) -> float:
        """What ranks finished architectures, lower is better: by default the accuracy alone."""
        return -accuracy

    @property
    def multiplier(self) -> float | None:
        """The learned multiplier of the budget, where there is one."""
        return None

    @property
    def multipliers(self) -> Mapping[str, float]:
        """The learned multipliers of limits, by name."""
        return _NONE

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, state


def check_reachable(
    cost: str, budget: float, reachable: tuple[float, float], unit: str, origin: str = ""
) -> None:
    """Refuse a budget that no architecture meets, or that every architecture meets.

    Args:
        cost: its name.
        reachable: cost of the cheapest and of the dearest valid architecture.
        origin: where the budget comes from, for the message.

    Raises:
        ValueError: with the range.
    """
    low, high = reachable
    reach = f"{cost} of this space on this target reaches from {low:.6g} to {high:.6g} {unit}"
    if budget < low:
        raise ValueError(f"a budget of {budget:.6g} {unit}{origin} cannot be met: {reach}")
    if budget > high:
        raise ValueError(
            f"a budget of {budget:.6g} {unit}{origin} rules nothing out: {reach}; give a smaller "
            "one, choose a larger space, or search without one (objective=none)"
        )


class TaskOnly(Objective):
    """CE: the cost is ignored while searching (a budget still binds the derivation)."""

    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        return task_loss


class _Penalty(Objective):
    def rank(self, accuracy: float, task_loss: float, cost: float) -> float:
        return float(self.loss(torch.tensor(task_loss), torch.tensor(cost, dtype=torch.float64)))


class Additive(_Penalty):
    """CE + lambda1 ||w||^2 + lambda2 E[cost] (ProxylessNAS, equation 7).

    Args:
        lambda1: of the squared norm of the weights; it sets the weight optimizer's decay to
            2 lambda1, the gradient of the term. None leaves the optimizer's own.
        lambda2: loss per unit of cost (per ms, MAC or parameter).
    """

    def __init__(self, lambda2: float, lambda1: float | None = None, **budget: Any) -> None:
        super().__init__(**budget)
        self.lambda2 = lambda2
        self.weight_decay = None if lambda1 is None else 2 * lambda1

    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        return task_loss + self.lambda2 * cost


class _Logarithmic(_Penalty):
    def __init__(self, alpha: float, beta: float, unit: str, **budget: Any) -> None:
        super().__init__(**budget)
        if self.cost == "latency" and unit not in UNITS:
            raise ValueError(f"objective.unit={unit!r} is unknown; valid: {', '.join(UNITS)}")
        self.alpha, self.beta = alpha, beta
        self.unit = unit if self.cost == "latency" else self.cost
        self.scale = UNITS[unit] if self.cost == "latency" else 1.0

    def prepare(self, reachable: tuple[float, float], unit: str) -> None:
        super().prepare(reachable, unit)
        self._check(self.scale * reachable[0])

    def _check(self, value: float) -> None:
        if value <= 1:
            raise ValueError(
                f"the logarithm of a cost of {value:.4g} {self.unit} is not positive: declare a "
                "smaller unit (objective.unit=us) or choose another objective"
            )

    def _log(self, cost: Tensor) -> Tensor:
        value = self.scale * cost
        self._check(float(value.detach()))
        return torch.log(value)


class Proxyless(_Logarithmic):
    """CE * alpha (ln E / ln ref)^beta, as in the official ProxylessNAS code.

    Args:
        ref: reference cost, in `unit`.
        alpha, beta: 0.2 and 0.3 in the official code.
        unit: of the logarithms, ms or us.
    """

    def __init__(
        self, ref: float, alpha: float = 0.2, beta: float = 0.3, unit: str = "ms", **budget: Any
    ) -> None:
        super().__init__(alpha, beta, unit, **budget)
        self._check(ref)
        self.log_ref = math.log(ref)

    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        return task_loss * self.alpha * (self._log(cost) / self.log_ref) ** self.beta


class FBNet(_Logarithmic):
    """CE * alpha (ln E)^beta (Wu et al. 2019, equation 2; the power is outside the logarithm).

    Args:
        alpha, beta: 0.2 and 0.6 in the paper.
        unit: of the logarithm, ms or us.
    """

    def __init__(
        self, alpha: float = 0.2, beta: float = 0.6, unit: str = "us", **budget: Any
    ) -> None:
        super().__init__(alpha, beta, unit, **budget)

    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        return task_loss * self.alpha * self._log(cost) ** self.beta


class Product(Objective):
    """The reward ACC (cost / target)^w of MnasNet (Tan et al. 2019, equations 2 and 3), with
    w = alpha where the cost is at most the target, and beta above it.

    It ranks architectures that are tried one by one; a gradient search has no use for it.

    Args:
        target: T, in the unit of the cost; no bound, which a budget is.
        alpha, beta: both -0.07 for the soft form, 0 and -1 for the hard one.
    """

    differentiable = False

    def __init__(self, target: float | None, alpha: float, beta: float, **budget: Any) -> None:
        super().__init__(**budget)
        if target is None or not (math.isfinite(target) and target > 0):
            raise ValueError(
                f"objective.target={target} must be a positive number: the {self.cost} that an "
                "architecture should have, in ms for latency"
            )
        if alpha > 0 or beta > 0:
            raise ValueError(
                f"objective.alpha={alpha} and objective.beta={beta} must be at most 0: a larger "
                "cost is no merit"
            )
        self.target, self.alpha, self.beta = target, alpha, beta

    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        raise AssertionError("a reward of single architectures has no loss")

    def rank(self, accuracy: float, task_loss: float, cost: float) -> float:
        exponent = self.alpha if cost <= self.target else self.beta
        return -float(accuracy * (cost / self.target) ** exponent)


class Budget(Objective):
    """min CE subject to E[cost] <= budget, by dual ascent on an augmented Lagrangian.

    With the violation g = E / budget - 1, an architecture step minimises
    CE + 1/2 (max(0, multiplier + g)^2 - multiplier^2), then the multiplier moves to
    max(0, multiplier + rate g) (Bertsekas 1982, section 2.2, with penalty 1). The rate is
    `ascent / num_steps`, so that searches of any length have the same reach. Each limit of an
    additive cost has a term and a multiplier of its own.

    Args:
        ascent: what the multiplier gains over a whole search in which E is twice the budget.
    """

    def __init__(self, ascent: float = 10.0, **budget: Any) -> None:
        super().__init__(**budget)
        if self.budget is None and self.share is None:
            raise ValueError(
                "objective=budget needs a budget: set objective.budget_ms (latency), "
                "objective.budget (any other cost) or objective.budget_share (of the largest "
                "network)"
            )
        self.ascent = ascent
        self._multiplier, self._used = 0.0, 0.0
        self._multipliers: dict[str, float] = {}

    @property
    def multiplier(self) -> float:
        return self._multiplier

    @property
    def multipliers(self) -> Mapping[str, float]:
        return self._multipliers

    def loss(
        self, task_loss: Tensor, cost: Tensor, limited: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        assert self.budget is not None
        loss = task_loss + _penalty(self._multiplier, cost / self.budget - 1)
        for name, value in limited.items():
            multiplier = self._multipliers.get(name, 0.0)
            loss = loss + _penalty(multiplier, value / self.limits[name] - 1)
        return loss

    def update(self, cost: float, limited: Mapping[str, float] = _NONE) -> None:
        assert self.budget is not None
        rate = self.ascent / self.num_steps
        self._used = cost / self.budget
        self._multiplier = max(0.0, self._multiplier + rate * (self._used - 1))
        for name, value in limited.items():
            moved = self._multipliers.get(name, 0.0) + rate * (value / self.limits[name] - 1)
            self._multipliers[name] = max(0.0, moved)

    def state_dict(self) -> dict[str, Any]:
        return {
            "multiplier": self._multiplier,
            "multipliers": dict(self._multipliers),
            "used": self._used,  # share of the budget, as expected at the last step
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._multiplier, self._used = float(state["multiplier"]), float(state["used"])
        self._multipliers = dict(state["multipliers"])


def _penalty(multiplier: float, violation: Tensor) -> Tensor:
    return 0.5 * (torch.clamp(multiplier + violation, min=0) ** 2 - multiplier**2)
