import itertools
from collections import Counter

import pytest
import torch

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.derive import Infeasible, check_limits, derive, reachable
from supernet.limits import Limit
from supernet.space import LinearConstraint, SearchSpace
from supernet.spaces.darts import EDGES, Darts, choice_name
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos


def few_darts_cells() -> Darts:
    """Free are two operations on the edges into the last node of the normal cell, and into the
    second one of the reduction cell: (10 * 4) * (3 * 4) valid architectures."""
    space = Darts(width=4, num_cells=3, img_size=8)
    for kind, (source, target) in itertools.product(("normal", "reduce"), EDGES):
        free = target == (5 if kind == "normal" else 3)
        kept = ("none", "skip_connect", "sep_conv_3x3") if free else (
            "max_pool_3x3" if source < 2 else "none",
        )  # fmt: skip
        choice = space.by_name[choice_name(kind, source, target)]
        space.exclude([f"{choice.name}={o}" for o in choice.options if o not in kept])
    return space


SPACES: dict[str, SearchSpace] = {
    "darts": few_darts_cells(),
    "mbconv": MBConv(stages=[[24, 2, 2], [40, 2, 2]], kernels=[3, 5], expansions=[3]),
    "nasbench201": NasBench201(),
    "spos": Spos(stages=[[32, 2, 2], [64, 2, 2]]),
}


def everything(space: SearchSpace) -> list[Architecture]:
    names = [choice.name for choice in space.choices]
    options = itertools.product(*(space.allowed(choice) for choice in space.choices))
    return [space.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]


def connected(a: Architecture) -> bool:
    """Depth-first through edges that are not `none`; mbconv has no such rule, and a node of DARTS
    keeps two edges."""
    if "normal_0_2" in dict(a):
        into = [n.rpartition("_")[::2] for n, op in a if op != "none"]
        nodes = Counter((name.split("_")[0], target) for name, target in into)
        return list(nodes.values()) == [2] * 8
    edges = [n.split("_")[1:] for n, op in a if n.startswith("edge") and op != "none"]
    if not any(n.startswith("edge") for n, _ in a):
        return True
    reached = {"0"}
    for _ in range(3):
        reached |= {t for s, t in edges if s in reached}
    return "3" in reached


def draw(space: SearchSpace, seed: int) -> tuple[dict[str, torch.Tensor], AdditiveCost]:
    generator = torch.Generator().manual_seed(seed)

    def vectors() -> dict[str, torch.Tensor]:
        return {
            c.name: torch.rand(len(c.options), generator=generator, dtype=torch.float64)
            for c in space.choices
        }

    scores = {name: torch.log_softmax(3 * v, dim=0) for name, v in vectors().items()}
    costs = vectors()
    if isinstance(space, Darts):  # an edge that is left out costs nothing
        for vector in costs.values():
            vector[0] = 0.0
    return scores, AdditiveCost(space.choices, 0.7, costs, "latency", "ms")


def worth(space: SearchSpace, scores: dict[str, torch.Tensor], a: Architecture) -> float:
    """The total score; in cells of DARTS, of the edges that are kept."""
    skipped = ("none",) if isinstance(space, Darts) else ()
    chosen = [(c, a[c.name]) for c in space.choices if a[c.name] not in skipped]
    return sum(scores[c.name][c.options.index(option)].item() for c, option in chosen)


def total(space: SearchSpace, values: dict[str, torch.Tensor], a: Architecture) -> float:
    return sum(values[c.name][c.options.index(a[c.name])].item() for c in space.choices)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_brute_force(name: str, seed: int) -> None:
    space = SPACES[name]
    scores, cost = draw(space, seed)
    valid = [a for a in everything(space) if connected(a)]
    costs = {a: 0.7 + total(space, cost.per_option, a) for a in valid}
    low, high = reachable(space, cost)
    assert low == pytest.approx(min(costs.values())) and high == pytest.approx(max(costs.values()))
    for share in (0.02, 0.3, 0.6, 1.0):
        budget = low + share * (high - low)
        best = max((a for a in valid if costs[a] <= budget), key=lambda a: worth(space, scores, a))
        found = derive(space, scores, cost, budget)
        assert worth(space, scores, found) == pytest.approx(worth(space, scores, best), abs=1e-9)
        assert costs[found] <= budget
    unbound = max(valid, key=lambda a: worth(space, scores, a))
    assert derive(space, scores) == unbound


def test_none_that_dominates_is_not_an_answer() -> None:
    space = NasBench201()
    scores = {c.name: torch.tensor([0.0, -9, -9, -9, -9]).double() for c in space.choices}
    found = derive(space, scores)
    assert connected(found)
    assert sum(option != "none" for _, option in found) == 1


def test_a_budget_that_is_exactly_a_cost_is_met() -> None:
    space = SPACES["mbconv"]
    scores, cost = draw(space, 9)
    for architecture in everything(space)[::7]:
        budget = cost.of(architecture)
        assert cost.of(derive(space, scores, cost, budget)) <= budget


def test_an_unreachable_budget_is_refused_with_the_range() -> None:
    space = SPACES["mbconv"]
    scores, cost = draw(space, 0)
    low, high = reachable(space, cost)
    with pytest.raises(Infeasible, match=f"{low:.6g} to {high:.6g}"):
        derive(space, scores, cost, 0.99 * low)


def test_scores_that_are_no_numbers_are_refused() -> None:
    space = SPACES["mbconv"]
    scores, _ = draw(space, 0)
    scores["stage1_0"][0] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        derive(space, scores)


class Pairwise(MBConv):
    """A space that states its own linear score and an extra rule."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.constraints = (LinearConstraint({("stage1_0", "k3_e3"): 1.0}, upper=0.0),)

    def scores(self, option_scores):
        return {name: -values for name, values in option_scores.items()}


def test_a_space_may_state_its_own_score_and_rules() -> None:
    space = Pairwise(stages=[[24, 2, 2]], kernels=[3, 5], expansions=[3])
    scores = {"stage1_0": torch.tensor([1.0, 2.0]), "stage1_1": torch.tensor([3.0, 1.0, 2.0])}
    found = derive(space, scores)
    assert dict(found) == {"stage1_0": "k5_e3", "stage1_1": "k5_e3"}


def draw_costs(space: SearchSpace) -> list[AdditiveCost]:
    """Three costs that pull in different directions."""
    names = [("latency", "ms"), ("macs", "MACs"), ("params", "parameters")]
    vectors = [draw(space, seed)[1].per_option for seed in (10, 11, 12)]
    return [
        AdditiveCost(space.choices, fixed, vector, *name)
        for fixed, vector, name in zip((0.7, 0.0, 2.0), vectors, names, strict=True)
    ]


@pytest.mark.parametrize("name", SPACES)
def test_several_limits_agree_with_brute_force(name: str) -> None:
    space = SPACES[name]
    scores, _ = draw(space, 4)
    costs = draw_costs(space)
    valid = [a for a in everything(space) if connected(a)]
    values = {a: [cost.fixed + total(space, cost.per_option, a) for cost in costs] for a in valid}
    for shares in ((0.5, 0.4, 0.6), (0.3, 0.9, 0.35), (0.7, 0.3, 1.0)):
        bounds = []
        for cost, share in zip(costs, shares, strict=True):
            low, high = reachable(space, cost)
            bounds.append(low + share * (high - low))
        within = [
            a for a in valid if all(v <= b for v, b in zip(values[a], bounds, strict=True))
        ]
        limits = [Limit(cost, b) for cost, b in zip(costs[1:], bounds[1:], strict=True)]
        if not within:
            with pytest.raises(Infeasible, match="macs <= .* and params <= .* together"):
                derive(space, scores, costs[0], bounds[0], limits)
            continue
        best = max(worth(space, scores, a) for a in within)
        found = derive(space, scores, costs[0], bounds[0], limits)
        assert found in within
        assert worth(space, scores, found) == pytest.approx(best, abs=1e-9)
        limited = [a for a in valid if all(limit.holds(a) for limit in limits)]
        ends = [values[a][0] for a in limited]
        assert reachable(space, costs[0], limits) == pytest.approx((min(ends), max(ends)))


def test_a_limit_that_cannot_be_met_is_named_with_its_range() -> None:
    space = SPACES["mbconv"]
    latency, macs, params = draw_costs(space)
    low, high = reachable(space, params)
    limits = [Limit(macs, 100.0), Limit(params, 0.9 * low)]
    with pytest.raises(
        Infeasible, match=f"meets params <= .* parameters: .* is {low:.6g} to {high:.6g} par"
    ):
        check_limits(space, latency, 100.0, limits)
    check_limits(space, latency, 100.0, [Limit(macs, 100.0), Limit(params, high)])


def test_excluded_candidates_are_not_chosen() -> None:
    space = NasBench201()
    space.exclude(["*=nor_conv_3x3", "edge_0_3=skip_connect"])
    scores, cost = draw(space, 5)
    valid = [a for a in everything(space) if connected(a)]
    valid = [a for a in valid if "nor_conv_3x3" not in dict(a).values()]
    valid = [a for a in valid if a["edge_0_3"] != "skip_connect"]
    best = max(total(space, scores, a) for a in valid)
    assert total(space, scores, derive(space, scores)) == pytest.approx(best, abs=1e-9)
    costs = [0.7 + total(space, cost.per_option, a) for a in valid]
    assert reachable(space, cost) == pytest.approx((min(costs), max(costs)))


def test_excluding_every_valid_architecture_is_said() -> None:
    space = NasBench201()
    names = [f"{edge}={op}" for edge in ("edge_0_3", "edge_1_3", "edge_2_3") for op in
             ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")]  # fmt: skip
    space.exclude(names)
    with pytest.raises(Infeasible, match="has no valid architecture; exclude fewer candidates"):
        reachable(space, draw(space, 0)[1])
