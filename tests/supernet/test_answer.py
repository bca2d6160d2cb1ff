from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from latency.model import AdditiveCost
from supernet.answer import LEAST_USE, BestRanked, MostProbable, Refined
from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

SPACE = MBConv(stages=[[24, 3, 2], [40, 2, 2]], kernels=[3, 5], expansions=[3])


def draw(seed: int) -> tuple[dict[str, torch.Tensor], AdditiveCost]:
    generator = torch.Generator().manual_seed(seed)

    def vectors() -> dict[str, torch.Tensor]:
        return {
            c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
            for c in SPACE.choices
        }

    scores = {name: torch.log_softmax(3 * v, dim=0) for name, v in vectors().items()}
    return scores, AdditiveCost(SPACE.choices, 0.5, vectors(), "latency", "ms")


def totals(scores: dict[str, torch.Tensor], every: list[Architecture]) -> dict[Architecture, float]:
    score = SPACE.scores(scores)
    return {
        a: sum(score[c.name][c.index(a[c.name])].item() for c in SPACE.choices) for a in every
    }


@pytest.mark.parametrize("seed", range(3))
def test_one_search_answers_for_every_budget(seed: int) -> None:
    scores, cost = draw(seed)
    every = _every()
    total, costs = totals(scores, every), {a: cost.of(a) for a in every}
    answer = MostProbable(SPACE, scores, cost)
    assert answer.best(None) == max(every, key=lambda a: total[a])
    low, high = min(costs.values()), max(costs.values())
    for share in (0.05, 0.3, 0.6, 1.0):
        budget = low + share * (high - low)
        best = max((a for a in every if costs[a] <= budget), key=lambda a: total[a])
        assert total[answer.best(budget)] == pytest.approx(total[best])
        assert costs[answer.best(budget)] <= budget
    with pytest.raises(Infeasible, match="the reachable range is"):
        answer.best(low - 0.01)


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_that_had_a_price_is_used_where_it_can_be(seed: int) -> None:
    scores, cost = draw(seed)
    every = _every()
    total, costs = totals(scores, every), {a: cost.of(a) for a in every}
    plain, priced = (MostProbable(SPACE, scores, cost, priced=p) for p in (False, True))
    low, high = min(costs.values()), max(costs.values())
    used = 0
    for share in (0.001, 0.1, 0.3, 0.6, 0.9, 1.5):
        budget = low + share * (high - low)
        within = [a for a in every if costs[a] <= budget]
        near = [a for a in within if costs[a] >= LEAST_USE * budget]
        used += bool(near)
        best = max(near or within, key=lambda a: total[a])
        assert priced.best(budget) == best and priced.binds(budget)
        assert plain.binds(budget) == (costs[plain.best(None)] > budget)
        tried = [a for a in near if a != best]
        rest = [a for a in within if a not in tried]
        left = [best] if near else rest
        assert priced.best(budget, but=tried) == max(left, key=lambda a: total[a])
    assert 3 <= used < 6
    assert priced.best(None) == plain.best(None) and not priced.binds(None)
    with pytest.raises(Infeasible, match="the reachable range is"):
        priced.best(low - 0.01)


def test_when_all_within_the_budget_were_tried_there_is_no_answer() -> None:
    scores, cost = draw(0)
    answer = MostProbable(SPACE, scores, cost)
    low = min(cost.of(architecture) for architecture in _every())
    tried: list[Any] = []
    budget = low + 0.05
    with pytest.raises(Infeasible):
        for _ in range(100):
            tried.append(answer.best(budget, but=tried))
    within = {a for a in _every() if cost.of(a) <= budget}
    assert set(tried) == within and len(tried) == len(within) > 0


def _every() -> list[Any]:
    names = [choice.name for choice in SPACE.choices]
    options = itertools.product(*(choice.options for choice in SPACE.choices))
    return [SPACE.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]


def record(index: int, cost: float, value: float, loss: float = 1.0) -> dict[str, Any]:
    """A ranked architecture, with options that tell which one it is."""
    digits = [(index >> bit) % 2 for bit in range(len(SPACE.choices))]
    options = {c.name: c.options[d] for c, d in zip(SPACE.choices, digits, strict=True)}
    return {
        "architecture": options, "cost": cost, "rank_value": value, "loss": loss,
        "candidate": index,
    }  # fmt: skip


def test_the_first_ranked_one_within_the_budget() -> None:
    records = [
        record(0, cost=5.0, value=10.0),
        record(1, cost=3.0, value=20.0, loss=0.7),
        record(2, cost=3.0, value=20.0, loss=0.5),
        record(3, cost=1.0, value=40.0),
        record(4, cost=3.0, value=20.0, loss=0.5),
        record(5, cost=2.0, value=50.0),
    ]
    for ranked in (records, records[::-1]):
        answer = BestRanked(SPACE, ranked)
        for budget, index in [(None, 0), (5.0, 0), (4.9, 2), (3.0, 2), (2.9, 3), (1.0, 3)]:
            assert answer.best(budget) == SPACE.architecture(records[index]["architecture"])
        with pytest.raises(Infeasible, match="none of the 6 .* at most 0.5; the cheapest costs 1"):
            answer.best(0.5)


def test_whether_a_budget_binds_is_unknown_where_nothing_dearer_was_ranked() -> None:
    ranked = [record(0, cost=5.0, value=10.0), record(1, cost=3.0, value=20.0)]
    answer = BestRanked(SPACE, ranked)
    assert [answer.binds(b) for b in (None, 7.0, 5.0, 4.0)] == [False, None, None, True]
    answer = BestRanked(SPACE, [record(0, cost=3.0, value=10.0), record(1, cost=5.0, value=20.0)])
    assert answer.binds(4.0) is False


@pytest.mark.parametrize("priced", [False, True])
def test_where_no_refined_one_is_within_a_budget_the_most_probable_one_is(priced: bool) -> None:
    scores, cost = draw(0)
    probable = MostProbable(SPACE, scores, cost, priced=priced)
    refined = BestRanked(SPACE, [record(0, cost=5.0, value=10.0), record(1, cost=3.0, value=20.0)])
    answer = Refined(refined, probable)
    for budget in (None, 5.0, 4.0, 3.0):
        assert answer.best(budget) == refined.best(budget)
        assert answer.binds(budget) == probable.binds(budget)
    assert answer.best(2.9) == probable.best(2.9)
    but = [refined.best(4.0)]
    assert answer.best(4.0, but) == probable.best(4.0, but)
    with pytest.raises(Infeasible, match="the reachable range is"):
        answer.best(0.1)


def test_what_a_space_no_longer_allows_is_no_answer() -> None:
    space = MBConv(stages=[[24, 2, 2]], kernels=[3, 5], expansions=[3])
    options = [{"stage1_0": "k3_e3", "stage1_1": o} for o in ("zero", "k5_e3", "k3_e3")]
    ranked = [
        {"architecture": o, "cost": 1.0, "rank_value": i, "loss": 0.0, "candidate": i}
        for i, o in enumerate(options)
    ]
    answer = BestRanked(space, ranked)
    assert dict(answer.best(None)) == options[0]
    space.at_most(["*=zero:0", "*=k3_e3:1"])
    assert dict(answer.best(None)) == options[1]


@pytest.mark.parametrize("seed", range(2))
def test_none_and_skips_do_not_win_where_the_budget_leaves_another_way(seed: int) -> None:
    space = NasBench201(num_cells=1)
    space.exclude(["*=nor_conv_1x1"])
    generator = torch.Generator().manual_seed(seed)
    names = [choice.name for choice in space.choices]
    logits = {name: torch.rand(5, generator=generator).double() for name in names}
    for vector in logits.values():
        vector[:2] += 2  # collapsed: `none` or a skip wins everywhere
    price = torch.tensor([0.0, 0.1, 1.0, 2.0, 0.5], dtype=torch.float64)
    prices = {choice.name: price for choice in space.choices}
    cost = AdditiveCost(space.choices, 0.5, prices, "latency", "ms")
    options = itertools.product(space.allowed(space.choices[0]), repeat=len(space.choices))
    every = [space.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]
    valid = [a for a in every if space.is_valid(a)]
    total = {a: sum(float(logits[n][space.by_name[n].index(o)]) for n, o in a) for a in valid}

    def keeps_the_rule(architecture: Architecture) -> bool:
        chosen = [option for _, option in architecture]
        return "none" not in chosen and chosen.count("skip_connect") <= 2

    plain = MostProbable(space, logits, cost)
    answer = MostProbable(space, logits, cost, guarded=True)
    for budget in (None, 8.0, 4.0, 2.75, 2.6, 1.0):
        within = [a for a in valid if budget is None or cost.of(a) <= budget]
        kept = [a for a in within if keeps_the_rule(a)]
        assert bool(kept) == (budget is None or budget >= 2.7)  # 2 skips and 4 pools: 0.5 + 2.2
        assert answer.best(budget) == max(kept or within, key=lambda a: total[a])
        assert not keeps_the_rule(plain.best(budget))
    assert len(space.constraints) == len(NasBench201(num_cells=1).constraints)
