from __future__ import annotations

import json
from collections.abc import Callable, Collection

import pytest
import torch

from latency.model import AdditiveCost
from latency.table import Measurement
from supernet.answer import Answer, MostProbable
from supernet.choice import Architecture
from supernet.derive import Infeasible, reachable
from supernet.meet import MAX_TRIES, TOLERANCE, Met, meet
from supernet.spaces.mbconv import MBConv

SPACE = MBConv(stages=[[24, 4, 2], [40, 4, 2]], kernels=[3, 5, 7], expansions=[3, 6])


def make_cost(seed: int = 0) -> AdditiveCost:
    """0.7 ms and 0.1 to 1.1 ms a block."""
    generator = torch.Generator().manual_seed(seed)
    per_option = {
        c.name: 0.1 + torch.rand(len(c.options), generator=generator, dtype=torch.float64)
        for c in SPACE.choices
    }
    return AdditiveCost(SPACE.choices, 0.7, per_option, "latency", "ms")


def greedy_for_time(cost: AdditiveCost, seed: int = 0) -> MostProbable:
    """A search that found slow options better: every budget below its answer binds."""
    generator = torch.Generator().manual_seed(100 + seed)
    scores = {
        name: 2 * vector + 0.2 * torch.rand(len(vector), generator=generator).double()
        for name, vector in cost.per_option.items()
    }
    return MostProbable(SPACE, scores, cost)


class Counting(Answer):
    """Counts what is asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.budgets = answer, list[float | None]()

    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        self.budgets.append(budget)
        return self.answer.best(budget, but)

    def binds(self, budget: float | None) -> bool:
        return self.answer.binds(budget)


def exactly(ms: float) -> Measurement:
    return Measurement(ms, 0.0, 0.0, 30)


def meet_on(
    device: Callable[[Architecture], float], cost: AdditiveCost, budget: float | None,
    answer: Answer | None = None,
) -> tuple[Met, list[Architecture]]:  # fmt: skip
    measured: list[Architecture] = []

    def measure(architecture: Architecture) -> Measurement:
        measured.append(architecture)
        return exactly(device(architecture))

    met = meet(answer or greedy_for_time(cost), budget, cost, cost.of, measure)
    assert [attempt.architecture for attempt in met.attempts] == measured
    return met, measured


@pytest.mark.parametrize("factor", [0.6, 0.8, 0.95, 1.0, 1.05, 1.2, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_hit_though_the_device_is_faster_or_slower_than_predicted(
    factor: float, seed: int
) -> None:
    cost = make_cost(seed)
    low, high = reachable(SPACE, cost)
    for share in (0.6, 0.8):
        budget = factor * (low + share * (high - low))
        met, measured = meet_on(
            lambda a: factor * cost.of(a), cost, budget, greedy_for_time(cost, seed)
        )
        ms = factor * cost.of(met.best.architecture)
        assert 1 - TOLERANCE <= ms / budget <= 1
        assert len(measured) <= 2  # one correction is enough where the error is the same for all


@pytest.mark.parametrize("seed", range(5))
def test_an_error_that_differs_from_network_to_network_is_corrected_too(seed: int) -> None:
    """Every block is off in its own way by up to 5%, and a call takes half a ms more."""
    cost = make_cost(seed)
    generator = torch.Generator().manual_seed(seed)
    true = AdditiveCost(
        SPACE.choices, 1.2,
        {n: v * (0.95 + 0.1 * torch.rand(len(v), generator=generator).double())
         for n, v in cost.per_option.items()}, "latency", "ms",
    )  # fmt: skip
    low, high = reachable(SPACE, true)
    budget = low + 0.5 * (high - low)
    met, measured = meet_on(true.of, cost, budget)
    assert 1 - TOLERANCE <= true.of(met.best.architecture) / budget <= 1
    assert len(set(measured)) == len(measured) <= MAX_TRIES


def test_without_a_budget_the_unconstrained_answer_is_measured() -> None:
    cost = make_cost()
    answer = greedy_for_time(cost)
    met, measured = meet_on(lambda a: 3.0, cost, None, answer)
    assert measured == [answer.best(None)]
    assert met.best.measured == exactly(3.0)
    assert met.best.allowed is None
    assert met.best.predicted == pytest.approx(cost.of(answer.best(None)))


def test_a_budget_that_does_not_bind_is_left_unused() -> None:
    cost = make_cost()
    answer = Counting(greedy_for_time(cost))
    wanted = answer.best(None)
    met, measured = meet_on(cost.of, cost, 3 * cost.of(wanted), answer)
    assert measured == [wanted] and met.best.architecture == wanted


def test_a_budget_that_had_a_price_is_used_though_the_wanted_network_is_far_below() -> None:
    """The device takes 7% less than predicted, so that one correction is needed."""
    cost = make_cost()
    low, high = reachable(SPACE, cost)
    cheap = {name: -vector for name, vector in cost.per_option.items()}
    for priced in (False, True):
        answer = MostProbable(SPACE, cheap, cost, priced=priced)
        assert cost.of(answer.best(None)) == pytest.approx(low)
        budget = 0.93 * (low + high) / 2
        met, measured = meet_on(lambda a: 0.93 * cost.of(a), cost, budget, answer)
        used = met.best.measured.median_ms / budget
        assert (used >= 1 - TOLERANCE and len(measured) == 2) if priced else used < 0.7
        assert used <= 1 and answer.binds(budget) == priced


def test_a_wanted_network_that_leaves_room_ends_it_only_where_the_budget_does_not_bind() -> None:
    """It is predicted to use the budget; the device takes 10% less."""
    cost = make_cost()
    cheap = {name: -vector for name, vector in cost.per_option.items()}
    budget = 1.005 * reachable(SPACE, cost)[0]
    for priced in (False, True):
        answer = MostProbable(SPACE, cheap, cost, priced=priced)
        met, measured = meet_on(lambda a: 0.9 * cost.of(a), cost, budget, answer)
        assert measured[0] == answer.best(None) and (len(measured) > 1) == priced
        used = met.best.measured.median_ms / budget
        assert (used >= 1 - TOLERANCE) == priced and used <= 1


def test_the_slowest_wanted_network_that_misses_is_given_up() -> None:
    cost = make_cost()
    answer = greedy_for_time(cost)
    budget = 1.05 * cost.of(answer.best(None))  # it is predicted to fit
    met, measured = meet_on(lambda a: 1.3 * cost.of(a), cost, budget, answer)
    assert measured[0] == answer.best(None)
    assert 1 - TOLERANCE <= met.best.measured.median_ms / budget <= 1
    assert met.best.architecture != measured[0]


class Listed(Answer):
    """The dearest of some networks that a budget allows; each costs what its name says."""

    def __init__(self, costs: list[float]) -> None:
        first = SPACE.choices[0]
        self.networks = {
            ms: SPACE.architecture(
                {c.name: c.options[(index if c == first else 0)] for c in SPACE.choices}
            )
            for index, ms in enumerate(costs)
        }
        vector = torch.zeros(len(first.options), dtype=torch.float64)
        vector[: len(costs)] = torch.tensor(costs, dtype=torch.float64)
        per_option = {c.name: torch.zeros(len(c.options)).double() for c in SPACE.choices}
        self.cost = AdditiveCost(
            SPACE.choices, 0.0, {**per_option, first.name: vector}, "latency", "ms"
        )

    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        within = [
            ms
            for ms, architecture in self.networks.items()
            if (budget is None or ms <= budget) and architecture not in but
        ]
        if not within:
            raise Infeasible("nothing is that fast")
        return self.networks[max(within)]


def run_listed(
    predicted: list[float], measured: list[float], budget: float
) -> tuple[Met, Listed, list[float]]:
    """Also what was measured, in order."""
    answer = Listed(predicted)
    times = {answer.networks[p]: m for p, m in zip(predicted, measured, strict=True)}
    met, order = meet_on(lambda a: times[a], answer.cost, budget, answer)
    return met, answer, [times[a] for a in order]


def test_the_best_attempt_within_the_budget_is_taken_not_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first misses; the second is far below, the third above again: the second it is."""
    met, answer, order = run_listed([6.0, 8.0, 10.0, 12.0], [5.0, 8.0, 11.0, 13.0], 10.0)
    # 10 takes 11; 9.06 allows 8, which takes 8; 9.45 allows 6, which would take less
    assert order == [11.0, 8.0]
    assert met.best.architecture == answer.networks[8.0]
    met, answer, order = run_listed([6.0, 8.0, 9.5, 12.0], [6.0, 8.5, 10.5, 13.0], 10.0)
    # 9.5 takes 10.5; 9.02 allows 8, which takes 8.5; 9.18 allows 6, which would take less
    assert order == [10.5, 8.5]
    assert met.best.measured.median_ms == 8.5
    assert not caplog.records


def test_of_those_within_the_budget_the_one_that_uses_most_of_it_is_taken() -> None:
    met, answer, order = run_listed([6.0, 8.0, 8.4, 12.0], [5.0, 6.5, 7.5, 13.0], 7.0)
    # 6 takes 5; 8.37 allows 8, which takes 6.5; 8.50 allows 8.4, which takes 7.5; 8.23 nothing new
    assert order == [5.0, 6.5, 7.5]
    assert met.best.architecture == answer.networks[8.0]
    met, answer, order = run_listed([5.0, 6.0, 8.0, 12.0], [4.0, 5.0, 11.0, 13.0], 7.0)
    # 6 takes 5; 8.37 allows 8, which takes 11; 6.1 allows 5, which would take less
    assert order == [5.0, 11.0]
    assert met.best.architecture == answer.networks[6.0]


def test_a_network_that_is_close_enough_ends_it() -> None:
    assert run_listed([4.0, 6.0, 8.0, 12.0], [3.0, 4.0, 8.3, 13.0], 8.5)[2] == [8.3]


def test_a_network_that_was_measured_is_not_derived_again() -> None:
    met, answer, order = run_listed([7.9, 8.0, 12.0], [8.1, 8.3, 13.0], 8.2)
    # 8 takes 8.3, 101%; 7.88 allows nothing but 8 and 7.9 are a hair apart
    assert order == [8.3] and met.best.measured.median_ms == 8.3
    met, answer, order = run_listed([7.8, 8.0, 12.0], [8.15, 8.3, 13.0], 8.2)
    assert order == [8.3, 8.15]
    assert met.best.architecture == answer.networks[7.8]


def test_where_nothing_fits_the_fastest_is_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    met, answer, order = run_listed([4.0, 6.0, 8.0], [9.0, 8.5, 12.0], 8.2)
    # 8 takes 12; 5.6 allows 4, which takes 9; 4.7 allows nothing new
    assert order == [12.0, 9.0]
    assert met.best.measured.median_ms == 9.0
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert warning.getMessage() == (
        "no derived network was measured within 8.2 ms: the fastest of 2 takes 9 ms"
    )


def test_at_most_so_many_networks_are_measured() -> None:
    """A device that takes 5% more than allowed, whatever is derived."""
    cost = make_cost()
    answer = Counting(greedy_for_time(cost))
    low, high = reachable(SPACE, cost)
    budget = (low + high) / 2
    met, measured = meet_on(lambda a: 1.05 * budget, cost, budget, answer)
    assert len(measured) == len(met.attempts) == MAX_TRIES
    assert [attempt.allowed for attempt in met.attempts] == answer.budgets[1:]
    assert len({attempt.architecture for attempt in met.attempts}) == MAX_TRIES


def test_a_budget_that_no_prediction_allows_is_refused() -> None:
    cost = make_cost()
    low, _ = reachable(SPACE, cost)
    with pytest.raises(Infeasible, match="the reachable range"):
        meet_on(cost.of, cost, 0.9 * low)


def test_the_whole_network_may_be_predicted_below_its_cost() -> None:
    """In a cell with idle edges: the cost is that of the options, the prediction of the network."""
    cost = make_cost()
    low, high = reachable(SPACE, cost)
    budget = 0.5 * (low + high)
    met = meet(
        greedy_for_time(cost), budget, cost, lambda a: 0.7 * cost.of(a),
        lambda a: exactly(0.7 * cost.of(a)),
    )  # fmt: skip
    assert 1 - TOLERANCE <= met.best.measured.median_ms / budget <= 1
    assert met.best.predicted == pytest.approx(met.best.measured.median_ms)
    assert met.best.allowed is not None and met.best.allowed > 1.3 * budget


def test_attempts_are_json() -> None:
    cost = make_cost()
    met, _ = meet_on(lambda a: 1.2 * cost.of(a), cost, 6.0)
    first = met.attempts[0]
    value = json.loads(json.dumps(first.to_dict()))
    assert value["allowed"] == 6.0
    assert value["measured_ms"]["median_ms"] == pytest.approx(1.2 * value["predicted"])
    assert SPACE.architecture(value["architecture"]) == first.architecture
