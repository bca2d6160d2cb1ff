"""Cells that grow, the surrogate that ranks them, and the search of both."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from supernet.choice import Architecture
from supernet.estimators.base import Estimate, Estimator
from supernet.estimators.zero_cost import ZeroCost
from supernet.space import SearchSpace
from supernet.spaces.pnas import PNAS
from supernet.strategies import progressive, surrogate
from supernet.strategies.base import Problem, Run
from supernet.strategies.growth import Cell, Growth, canonical, expand
from supernet.strategies.progressive import Progressive
from supernet.strategies.random_search import RandomSearch
from supernet.strategies.surrogate import Surrogate
from supernet.tracking import read_journal

SLOW = pytest.mark.slow
SETTINGS: dict[str, Any] = {"in_chans": 1, "img_size": 8, "width": 2, "num_cells": 3}
WORTH = random.Random(1)
OPERATIONS = {name: WORTH.gauss(0, 1) for name in PNAS.operations}
STATES = {str(state): WORTH.gauss(0, 0.5) for state in range(6)}


class Four(PNAS):
    operations = ("sep_conv_3x3", "identity", "max_pool_3x3", "conv_1x7_7x1")


SPACE = Four(**SETTINGS, num_blocks=3)


class Sum(Estimator):
    """Each input and each operation has a worth."""

    judge, judges_parts = "a sum", True

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[Architecture] = []
        self.stop_at = stop_at

    def prepare(self, problem: Problem, run: Run, saved: Any) -> None:
        pass

    def estimate(self, architecture: Architecture) -> Estimate:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(architecture)
        sides = [option.split("_", 1) for name, option in architecture if name[-4:] != "_end"]
        worth = 50 + sum(STATES[state] + OPERATIONS[operation] for state, operation in sides)
        return Estimate(worth, -worth)


def make_surrogate(**changes: Any) -> Surrogate:
    settings: dict[str, Any] = {
        "num_members": 5, "embedding": 20, "hidden": 20, "epochs": 20, "batch_size": 32,
        "first_lr": 0.01, "lr": 0.005,
    }  # fmt: skip
    return Surrogate(**{**settings, **changes})


def make_search(
    num_evaluations: int | None = None, beam: int = 10, epochs: int = 20
) -> Progressive:
    surrogate = make_surrogate(epochs=epochs)
    return Progressive(beam=beam, surrogate=surrogate, num_evaluations=num_evaluations)


def num_blocks_of(architecture: Architecture) -> int:
    return int(json.loads(architecture.settings)["num_blocks"])


# ---- growth


def all_cells(num_blocks: int, num_operations: int) -> Iterator[Cell]:
    """In every order of sides and blocks."""
    sides = [list(product(range(2 + b), range(num_operations))) for b in range(num_blocks)]
    yield from product(*(product(own, own) for own in sides))


def same(cell: Cell) -> frozenset[Cell]:
    """The cells that differ from it in the order of sides and blocks alone, by brute force."""
    found = set()
    for order in permutations(range(len(cell))):
        numbers = {0: 0, 1: 1, **{2 + old: 2 + new for new, old in enumerate(order)}}
        blocks = [
            tuple(sorted((numbers[s], op) for s, op in cell[old])) for old in order
        ]
        if all(s < 2 + b for b, block in enumerate(blocks) for s, _ in block):
            found.add(tuple(blocks))
    return frozenset(found)


@pytest.mark.parametrize(("num_blocks", "num_operations"), [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_every_cell_is_grown_once(num_blocks: int, num_operations: int) -> None:
    grown: list[Cell] = [()]
    for _ in range(num_blocks):
        grown = expand(grown, num_operations)
    assert len(grown) == len(set(grown))
    if num_blocks < 4:
        classes = {same(cell) for cell in all_cells(num_blocks, num_operations)}
    else:
        classes = {same(cell) for cell in grown}
    assert {same(cell) for cell in grown} == classes and len(grown) == len(classes)
    assert all(canonical(cell) == cell for cell in grown)


@pytest.mark.parametrize("num_operations", [1, 2, 8])
def test_there_are_as_many_as_the_formula_has(num_operations: int) -> None:
    """Pairs of sides; then pairs of blocks, or a block and one that reads it. 8 operations: the
    paper's 136 cells of one block."""
    first, second = (n * num_operations * (n * num_operations + 1) // 2 for n in (2, 3))
    one = expand([()], num_operations)
    assert len(one) == first
    assert len(expand(one, num_operations)) == first * (first + 1) // 2 + first * (second - first)
    assert num_operations != 8 or first == 136


def test_twins_that_are_read_unequally_are_not_one_cell() -> None:
    twins: Cell = (((0, 0), (0, 0)), ((0, 0), (0, 0)))
    both, one, other = (canonical((*twins, (a, b))) for a, b in (
        ((2, 0), (3, 0)), ((2, 0), (2, 0)), ((3, 0), (3, 0))
    ))  # fmt: skip
    assert both != one == other


def test_a_cell_is_the_architecture_it_says(make_tried: Any) -> None:
    space = Four(**SETTINGS, num_blocks=2)
    growth = Growth(make_tried(space=space, share=1.0))
    small = growth.architecture((((0, 1), (1, 3)),))
    assert dict(small) == {"cell_2_left": "0_identity", "cell_2_right": "1_conv_1x7_7x1"}
    assert SearchSpace.of(small).build_network(small, 10)
    whole = growth.architecture((((0, 1), (1, 3)), ((0, 0), (2, 2))))
    assert space.check(whole) == whole and whole["cell_3_right"] == "2_max_pool_3x3"


def test_a_part_fits_where_a_whole_cell_of_it_does(make_tried: Any) -> None:
    """By trying all the cells that come of it."""
    space = Four(**SETTINGS, num_blocks=2)
    space.exclude(["*=1_identity"])
    space.at_most(["*=0_max_pool_3x3:1"])
    problem = make_tried(space=space, share=0.7)
    growth = Growth(problem)
    found = set()
    for cell in expand([()], 4):
        fits = any(growth.fits(whole) for whole in expand([cell], 4))
        assert growth.fits(cell) or not fits
        found.add((growth.fits(cell), fits))
    assert {(True, True), (False, False)} <= found


# ---- surrogate


def worth_of(cell: Cell, noise: random.Random) -> float:
    names = list(OPERATIONS)
    total = sum(STATES[str(state)] + OPERATIONS[names[op]] for block in cell for state, op in block)
    return total + noise.gauss(0, 0.3)


def test_the_surrogate_ranks_larger_cells_than_it_saw() -> None:
    noise = random.Random(2)
    one, seen = expand([()], 8), random.Random(3)
    cells = [*one, *seen.sample(expand(one, 8), 100)]
    larger = seen.sample(expand(seen.sample(cells[len(one) :], 20), 8), 300)
    accuracies = [worth_of(cell, noise) for cell in cells]
    true = [worth_of(cell, noise) for cell in larger]
    shuffled = seen.sample(accuracies, len(accuracies))

    def correlation(targets: list[float]) -> float:
        generator = torch.Generator().manual_seed(0)
        ensemble = make_surrogate().fit(cells, targets, 6, 8, generator)
        return float(spearmanr(ensemble.predict(larger), true).statistic)

    assert correlation(accuracies) > 0.6 > 0.4 > correlation(shuffled)


def test_a_member_is_fitted_to_all_parts_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rates = [], []

    def keep(
        self: Any, member: Any, blocks: Any, present: Any, targets: Any, lr: float, _: Any
    ) -> Any:
        rows.append(set(targets.tolist()))
        rates.append(lr)
        return member

    monkeypatch.setattr(Surrogate, "_train", keep)
    cells = expand([()], 2)
    make_surrogate().fit(cells, range(len(cells)), 3, 2, torch.Generator())
    assert len(rows) == 5 and {len(part) for part in rows} == {len(cells) * 4 // 5}
    assert set.intersection(*rows) == set() and len(set.union(*rows)) == len(cells)
    cells += expand(cells[:1], 2)
    make_surrogate().fit(cells, range(len(cells)), 4, 2, torch.Generator())
    assert rates == [0.01] * 5 + [0.005] * 5


def test_predictions_depend_on_the_generator_alone_and_not_on_smaller_cells_beside() -> None:
    cells = expand([()], 2)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        generator = torch.Generator().manual_seed(5)
        found.append(make_surrogate().fit(cells, range(len(cells)), 4, 2, generator))
        assert torch.equal(before, torch.random.get_rng_state())
    larger = expand(cells[:1], 2)
    assert found[0].predict(larger) == found[1].predict(larger)
    mixed = found[0].predict([*cells, *larger])
    assert mixed == pytest.approx(found[0].predict(cells) + found[0].predict(larger), abs=1e-5)


@pytest.mark.parametrize("accuracies", [[1.0, 1.0, 1.0], [1.0, -float("inf"), 2.0]])
def test_equal_and_lost_accuracies_can_be_fitted(accuracies: list[float]) -> None:
    cells = expand([()], 1)
    ensemble = make_surrogate().fit(cells, accuracies, 3, 1, torch.Generator())
    assert torch.tensor(ensemble.predict(cells)).isfinite().all()


def test_who_has_no_accuracy_is_fitted_as_the_worst() -> None:
    found = surrogate._standardised([2.0, -math.inf, 5.0, math.nan]).tolist()
    assert found == pytest.approx([-(3**-0.5), -(3**-0.5), 3**0.5, -(3**-0.5)])


# ---- search


@pytest.fixture
def make_case(make_tried: Any) -> Callable[..., Problem]:
    def make(estimator: Estimator | None = None, share: float = 1.0, seed: int = 0) -> Problem:
        problem: Problem = make_tried(
            estimator=estimator or Sum(), space=SPACE, share=share, seed=seed
        )
        return problem

    return make


def test_cells_grow_and_the_journal_says_how_well_they_were_predicted(
    make_case: Any, make_run: Any
) -> None:
    judge, run = Sum(), make_run()
    answer = make_search(epochs=2).search(make_case(judge), run)
    assert [num_blocks_of(a) for a in judge.asked] == [1] * 36 + [2] * 10 + [3] * 10
    journal = read_journal(run.folder / "metrics.jsonl")
    phases = ["part"] * 46 + ["surrogate"] + ["rank"] * 10 + ["surrogate"]
    assert [record["phase"] for record in journal] == phases
    notes = [record for record in journal if record["phase"] == "surrogate"]
    assert [(n["num_blocks"], n["fitted"], n["judged"]) for n in notes] == [
        (2, 36, 10), (3, 46, 10)
    ]  # fmt: skip
    assert all(-1 <= note["rank_correlation"] <= 1 for note in notes)
    best = answer.best(None)
    assert num_blocks_of(best) == 3 and answer.num_judged == 56
    assert answer.judged(best)[0] == max(r["accuracy"] for r in journal if r["phase"] == "rank")


def test_the_best_of_the_largest_cells_are_expanded_and_the_surrogate_is_fitted_to_all(
    make_case: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expanded, fitted, fit = [], [], Surrogate.fit

    def spy_expand(cells: Sequence[Cell], num_operations: int) -> list[Cell]:
        expanded.append(list(cells))
        return expand(cells, num_operations)

    def spy_fit(self: Any, cells: Any, accuracies: Any, *others: Any) -> Any:
        fitted.append(dict(zip(cells, accuracies, strict=True)))
        return fit(self, cells, accuracies, *others)

    monkeypatch.setattr(progressive, "expand", spy_expand)
    monkeypatch.setattr(Surrogate, "fit", spy_fit)
    make_search(beam=3, epochs=2).search(make_case(), make_run())
    assert [len(judged) for judged in fitted] == [36, 36 + 3]
    for size, judged in enumerate(fitted, start=1):
        worth = sorted(judged[cell] for cell in judged if len(cell) == size)
        assert sorted(judged[cell] for cell in expanded[size - 3]) == worth[-3:]
        assert {len(cell) for cell in expanded[size - 3]} == {size}


@SLOW
def test_it_finds_better_cells_than_random_search(make_case: Any, make_run: Any) -> None:
    found = []
    for seed in range(2):
        one, other = (
            strategy.search(make_case(seed=seed), make_run(f"{index}_{seed}"))
            for index, strategy in enumerate((make_search(), RandomSearch(num_evaluations=56)))
        )
        best = [answer.judged(answer.best(None))[0] for answer in (one, other)]
        found.append(best[0] - best[1])
    assert all(gain > 0 for gain in found)


def test_the_answer_is_within_the_budget(make_case: Any, make_run: Any) -> None:
    judge, free = Sum(), Sum()
    problem = make_case(judge, share=0.3)
    answer = make_search(epochs=2).search(problem, make_run())
    assert problem.is_feasible(answer.best(problem.objective.budget))
    make_search(epochs=2).search(make_case(free), make_run("free"))
    within, others = (
        [problem.is_feasible(a) for a in tried.asked if num_blocks_of(a) == 3]
        for tried in (judge, free)
    )
    assert all(within) and not all(others)


@pytest.mark.parametrize(
    "stop_at", [pytest.param(36, marks=SLOW), 46, pytest.param(55, marks=SLOW)]
)
def test_it_goes_on_where_it_was_interrupted(
    stop_at: int, make_case: Any, make_run: Any, check_resumes: Any
) -> None:
    judges = [Sum(), Sum(stop_at), Sum(), Sum()]
    whole = make_run("whole")
    best = make_search(epochs=2).search(make_case(judges[0]), whole).best(None)
    with pytest.raises(KeyboardInterrupt):
        make_search(epochs=2).search(make_case(judges[1]), make_run("cut"))
    for judge in judges[2:]:
        again = make_run("cut", resume=True)
        assert make_search(epochs=2).search(make_case(judge), again).best(None) == best
        one, other = ((r.folder / "metrics.jsonl").read_bytes() for r in (whole, again))
        assert one == other
    assert judges[2].asked == judges[0].asked[stop_at:] and judges[3].asked == []


def test_untrained_networks_are_judged_at_all_sizes(make_case: Any, make_run: Any) -> None:
    problem = make_case(ZeroCost(proxy="params", batch_size=2))
    run = make_run()
    make_search(48, beam=2, epochs=2).search(problem, run)
    params = {
        record["settings"]["num_blocks"] if "settings" in record else 3: record["accuracy"]
        for record in read_journal(run.folder / "metrics.jsonl")
        if record["phase"] != "surrogate"
    }
    assert params[1] < params[2] < params[3]


# ---- what is refused


def test_what_it_cannot_do_is_refused_before_anything_is_judged(
    make_case: Any, make_run: Any
) -> None:
    class WholeOnly(Sum):
        judges_parts = False

    with pytest.raises(ValueError, match="estimator=from_scratch or zero_cost"):
        make_search(epochs=2).search(make_case(WholeOnly()), make_run())
    judge = Sum()
    with pytest.raises(ValueError, match=r"num_evaluations=46 .* to 47 or more"):
        make_search(46, epochs=2).search(make_case(judge), make_run())
    assert judge.asked == []
    answer = make_search(47, epochs=2).search(make_case(judge), make_run())
    assert num_blocks_of(answer.best(None)) == 3


def test_cells_that_are_excluded_need_no_evaluations(make_case: Any, make_run: Any) -> None:
    case = make_case(judge := Sum())
    name = case.space.operations[0]
    case.space.exclude([f"*={source}_{name}" for source in range(2)])
    with pytest.raises(ValueError, match=r": (\d+) have one") as error:
        make_search(1, epochs=2).search(case, make_run())
    match = re.search(r": (\d+) have one.* to (\d+) or more", str(error.value))
    assert match is not None
    make_search(int(match[2]), epochs=2).search(case, make_run())
    sizes = [num_blocks_of(architecture) for architecture in judge.asked]
    assert sizes.count(1) == int(match[1]) < 36


def test_a_search_that_ends_too_early_says_so(make_case: Any, make_run: Any) -> None:
    strategy = Progressive(beam=2, surrogate=make_surrogate(), seconds=1e-9)
    with pytest.raises(ValueError, match="after 1 cells .* raise max_seconds"):
        strategy.search(make_case(), make_run())


@pytest.mark.parametrize("name", ["num_members", "embedding", "epochs", "lr"])
def test_settings_of_the_surrogate_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy.surrogate.{name} .* got 0"):
        make_surrogate(**{name: 0})


def test_the_beam_is_checked() -> None:
    with pytest.raises(ValueError, match=r"strategy\.beam .* got 0"):
        make_search(beam=0)
