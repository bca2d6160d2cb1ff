"""The refinement's rule on made-up losses, and the short trainings behind it on real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from supernet.answer import Answer
from supernet.choice import Architecture
from supernet.data import Loader
from supernet.data.sources import MemorySource, Request
from supernet.engine import Diverged, make_accelerator
from supernet.estimators.short_training import ShortTraining
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.softmax import Softmax
from supernet.recipe import Recipe
from supernet.spaces.darts import OPERATIONS, Darts
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.base import Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.refinement import Refinement, one_change
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal


@pytest.fixture
def state(make_problem: Any) -> SearchState:
    """Two choices, of two and of three options; the logits like early options best."""
    sgd, adam = {"opt": "sgd", "lr": 0.1}, {"opt": "adam", "lr": 0.1}
    problem = make_problem(Softmax(), share=1.0)
    state = SearchState(problem, 10, sgd, adam, 0.0, torch.contiguous_format)
    with torch.no_grad():
        for vector in state.parameters.parameters():
            vector.copy_(-torch.arange(len(vector), dtype=torch.float32))
    return state


def architecture(state: SearchState, first: int, second: int) -> Architecture:
    choices = state.problem.space.choices
    assert [len(choice.options) for choice in choices] == [2, 3]
    places = zip(choices, (first, second), strict=True)
    return state.problem.space.architecture({c.name: c.options[i] for c, i in places})


def refine(refinement: Refinement, state: SearchState, run: Any, start: Architecture) -> None:
    scores = {name: vector.detach() for name, vector in state.parameters().items()}
    place = {"step": 0, "epoch": 0}
    new = refinement.refine(state.problem, run, start, scores, state.ranked, place)
    assert len(list(new)) == len(state.ranked)


def answer(state: SearchState, refinement: Refinement) -> Architecture:
    leader = refinement.leaders(state.ranked)[0]
    return state.problem.space.architecture(leader["architecture"])


def test_the_lead_goes_to_the_best_neighbour_while_it_gains_enough(
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any
) -> None:
    """From (0, 0) the best neighbour is (0, 1), from there (1, 1), whose neighbours gain less than
    the margin. No neighbour is tried twice, and what the scores like best comes first."""
    at = {(0, 0): 2.0, (1, 0): 1.9, (0, 1): 1.7, (0, 2): 1.8, (1, 1): 1.5, (1, 2): 1.4}
    losses = {architecture(state, *place): loss for place, loss in at.items()}
    judge = make_judge(lambda found, _: losses[found])
    run, refinement = make_run(), make_refinement()
    refine(refinement, state, run, architecture(state, 0, 0))
    asked = [
        ((0, 0), 9), ((1, 0), 3), ((0, 1), 3), ((0, 2), 3), ((0, 1), 9), ((1, 1), 3), ((1, 1), 9),
        ((1, 2), 3), ((1, 2), 9),
    ]  # fmt: skip
    assert judge.asked == [(architecture(state, *place), steps) for place, steps in asked]
    assert [r["move"] for r in state.ranked] == [0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert [r["final"] for r in state.ranked] == [steps == 9 for _, steps in asked]
    assert read_journal(run.folder / "metrics.jsonl") == state.ranked
    assert answer(state, refinement) == architecture(state, 1, 1)  # 1.4 is only 0.1 below
    leaders = refinement.leaders(state.ranked)
    assert [(r["loss"], r["rank_value"]) for r in leaders] == [(1.5, 0), (1.7, 1), (2.0, 2)]
    assert answer(state, make_refinement(margin=0.09)) == architecture(state, 1, 2)


@pytest.mark.parametrize("num_finalists,lead", [(1, (1, 0)), (2, (0, 2)), (3, (0, 1))])
def test_finalists_are_judged_by_their_longer_training(
    num_finalists: int, lead: tuple[int, int],
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any,
) -> None:  # fmt: skip
    """The shorter a training's loss, the longer the other's."""
    short = {(0, 0): 0.0, (1, 0): 1.0, (0, 2): 1.1, (0, 1): 1.2}
    long = {(0, 0): 2.0, (1, 0): 1.8, (0, 2): 1.7, (0, 1): 1.6}
    losses = {
        (architecture(state, *place), steps): loss
        for steps, at in ((3, short), (9, long)) for place, loss in at.items()
    }  # fmt: skip
    judge = make_judge(lambda *asked: losses[asked])
    refinement = make_refinement(moves=1, num_finalists=num_finalists)
    refine(refinement, state, make_run(), architecture(state, 0, 0))
    assert [steps for _, steps in judge.asked] == [9, 3, 3, 3] + [9] * num_finalists
    assert answer(state, refinement) == architecture(state, *lead)


def test_finalists_race_over_several_seeds(
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any
) -> None:
    """(0, 2) is best from the first seed, and (1, 0) on the mean of two; (0, 1) is more than the
    margin behind at once, and (0, 2) after the second."""
    losses = {(0, 0): [3.0], (1, 0): [1.7, 1.0], (0, 2): [1.6, 1.5], (0, 1): [1.8]}
    at = {architecture(state, *place): iter(series) for place, series in losses.items()}
    judge = make_judge(lambda found, steps: next(at[found]) if steps == 9 else 2.0)
    refinement = make_refinement(moves=1, num_finalists=3, repeats=4)
    run = make_run()
    refine(refinement, state, run, architecture(state, 0, 0))
    assert judge.repeats == [0] + [0, 0, 0] + [0, 0, 0] + [1, 1]
    assert [r["repeat"] for r in read_journal(run.folder / "metrics.jsonl")] == judge.repeats
    assert answer(state, refinement) == architecture(state, 1, 0)
    assert refinement.leaders(state.ranked)[0]["loss"] == pytest.approx(1.35)


def test_a_race_ends_after_its_repeats_and_is_lost_by_who_left_it(
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any
) -> None:
    losses = {(0, 0): [3.0], (1, 0): [1.0, 1.6, 1.7], (0, 2): [1.1, 1.6, 1.8], (0, 1): [1.16]}
    at = {architecture(state, *place): iter(series) for place, series in losses.items()}
    judge = make_judge(lambda found, steps: next(at[found]) if steps == 9 else 2.0)
    refinement = make_refinement(moves=1, num_finalists=3, repeats=3)
    refine(refinement, state, make_run(), architecture(state, 0, 0))
    assert judge.repeats[4:] == [0, 0, 0, 1, 1, 2, 2]
    # (0, 1) has the lowest mean by now, of one lucky seed
    assert answer(state, refinement) == architecture(state, 1, 0)


def test_a_winner_and_the_leader_are_compared_from_the_same_seeds(
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any
) -> None:
    """The first seed is a hard one: the mean of three is lower for all, of which the leader, that
    was trained from one, knows nothing."""
    hard = {0: 0.3, 1: 0.0, 2: 0.0}
    judge = make_judge(lambda found, steps: 2.0 + hard[judge.repeats[-1]])
    refinement = make_refinement(moves=1, num_finalists=3, repeats=3)
    start = architecture(state, 0, 0)
    refine(refinement, state, make_run(), start)
    assert judge.repeats[4:] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert answer(state, refinement) == start


@pytest.mark.parametrize(
    "changes,num_trained,lead",
    [
        ({"margin": 0.31}, 5, (0, 0)),
        ({"moves": 1}, 5, (0, 1)),
        ({"num_neighbours": 1}, 3, (0, 0)),
        ({"num_neighbours": 2}, 6, (0, 1)),
    ],
)
def test_it_ends_where_nothing_gains_or_all_moves_are_made(
    changes: dict[str, Any], num_trained: int, lead: tuple[int, int],
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any,
) -> None:  # fmt: skip
    at = {(0, 0): 2.0, (1, 0): 1.9, (0, 1): 1.7, (0, 2): 1.8, (1, 1): 1.69, (1, 2): 9.0}
    losses = {architecture(state, *place): loss for place, loss in at.items()}
    judge = make_judge(lambda found, _: losses[found])
    refinement = make_refinement(**changes)
    refine(refinement, state, make_run(), architecture(state, 0, 0))
    assert len(judge.asked) == num_trained
    assert answer(state, refinement) == architecture(state, *lead)


@pytest.mark.parametrize("share,uppers", [(0.99, {}), (1.0, {"params": 1900.0})])
def test_neighbours_are_within_budget_and_limits(
    share: float, uppers: dict[str, float],
    make_problem: Any, make_run: Any, make_judge: Any, make_refinement: Any,
) -> None:  # fmt: skip
    sgd, adam = {"opt": "sgd", "lr": 0.1}, {"opt": "adam", "lr": 0.1}
    problem = make_problem(Softmax(), share=share, uppers=uppers)
    state = SearchState(problem, 10, sgd, adam, 0.0, torch.contiguous_format)
    judge = make_judge(lambda found, _: -problem.cost.of(found))
    start = problem.derive(problem.relaxation.scores(state.parameters()))
    refine(make_refinement(margin=0.0), state, make_run(), start)

    def within(found: Architecture) -> bool:
        return problem.cost.of(found) <= problem.objective.budget and all(
            limit.cost.of(found) <= limit.upper for limit in problem.limits
        )

    tried = judge.architectures
    assert len(tried) > 1 and all(map(within, tried))
    assert not all(within(x) for found in tried for x in one_change(problem.space, found))


def test_one_change_is_every_valid_neighbour() -> None:
    space = NasBench201(in_chans=1, img_size=8, widths=[4], num_cells=1)
    cell = space.architecture(dict.fromkeys(space.by_name, "nor_conv_3x3"))
    around = list(one_change(space, cell))
    assert len(set(around)) == 24
    assert all(sum(a != b for a, b in zip(cell, x, strict=True)) == 1 for x in around)
    path = {"edge_0_3": "skip_connect"}  # the only way through
    lone = space.architecture({**dict.fromkeys(space.by_name, "none"), **path})
    assert len(list(one_change(space, lone))) == 5 * 4 + 3
    space.exclude(["*=avg_pool_3x3"])
    assert len(list(one_change(space, cell))) == 18


def fewest_changes(space: Darts, cell: Architecture, names: Sequence[str]) -> set[Architecture]:
    """By trying every setting of the choices of these names."""
    at = {pair: list[tuple[int, Architecture]]() for pair in product(names, OPERATIONS)}
    for operations in product(OPERATIONS, repeat=len(names)):
        options = dict(zip(names, operations, strict=True))
        changed = space.architecture({**dict(cell), **options})
        if space.is_valid(changed):
            changes = sum(cell[name] != option for name, option in options.items())
            for pair in options.items():
                at[pair].append((changes, changed))
    return {
        changed
        for (name, option), found in at.items() if option != cell[name]
        for changes, changed in found if changes == min(found, key=lambda pair: pair[0])[0]
    }  # fmt: skip


@pytest.mark.parametrize("at_most", [[], ["normal_*=skip_connect:2"]])
def test_one_change_brings_edges_of_darts_in_for_one_that_is_kept(at_most: list[str]) -> None:
    """A normal cell that may skip no more often, and whose second node has both its skips: there a
    further skip takes the place of another one."""
    space = Darts(in_chans=1, width=4, num_cells=3, img_size=8)
    cell = space.sample(torch.Generator().manual_seed(4))
    kept = {"normal_0_3": "skip_connect", "normal_1_3": "skip_connect", "normal_2_3": "none"}
    others = {n: o.replace("skip_connect", "sep_conv_3x3") for n, o in cell if "normal" in n}
    cell = space.architecture({**dict(cell), **others, **kept})
    space.at_most(at_most)
    around = list(one_change(space, cell))
    assert len(set(around)) == len(around) and all(map(space.is_valid, around))
    changes = [{n for n, o in cell if x[n] != o} for x in around]
    for node in (2, 3):
        names = [name for name in space.by_name if name in {f"normal_{s}_{node}" for s in range(5)}]
        found = {x for x, at in zip(around, changes, strict=True) if at <= set(names)}
        assert found == fewest_changes(space, cell, names)
    if not at_most:  # 6 other operations of 16 edges; 7 of the 6 left out of a cell, for 1 of 2
        assert sorted(map(len, changes)) == [1] * 16 * 6 + [2] * 2 * 6 * 7 * 2
    rewired = [x for x, at in zip(around, changes, strict=True) if len(at) == 2]
    assert {n for x in rewired for n, o in x if o != "none"} == set(space.by_name)


def test_one_that_diverges_does_not_lead(
    state: SearchState, make_run: Any, make_judge: Any, make_refinement: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    start = architecture(state, 0, 0)

    def loss(found: Architecture, _: int) -> float:
        if found != start:
            raise Diverged("the training loss is nan")
        return 1.0

    make_judge(loss)
    refinement = make_refinement()
    refine(refinement, state, make_run(), start)
    assert answer(state, refinement) == start and "an architecture is out" in caplog.text
    assert all(math.isfinite(record["loss"]) for record in state.ranked)


@pytest.mark.parametrize("fail_at", [0, 2, 5])
def test_an_interrupted_refinement_goes_on(
    fail_at: int, make_problem, make_strategy, make_judge, make_refinement, check_resumes
) -> None:
    def search(run: Run) -> Answer:
        strategy = make_strategy(cls=FirstOrder, refinement=make_refinement(margin=0.0))
        return strategy.search(make_problem(Softmax(), share=1.0), run)

    judge = make_judge(lambda found, steps: 1 + sum(map(ord, str(found))) % 89 / steps)
    check_resumes(judge, fail_at, search)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"moves": 0}, "refinement.moves must be 1 or more; got 0"),
        ({"num_neighbours": 0}, "refinement.num_neighbours must be 1 or more; got 0"),
        ({"steps": 0}, "refinement.steps must be 1 or more; got 0"),
        ({"num_finalists": 0}, "refinement.num_finalists must be 1 or more; got 0"),
        ({"final_steps": 0}, "refinement.final_steps must be 1 or more; got 0"),
        ({"repeats": 0}, "refinement.repeats must be 1 or more; got 0"),
        ({"num_images": 0}, "refinement.num_images must be 1 or more; got 0"),
        ({"margin": -0.1}, "refinement.margin must be 0 or more; got -0.1"),
    ],
)
def test_bad_numbers_are_refused(
    changes: dict[str, Any], message: str, make_refinement: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make_refinement(**changes)


def test_what_would_be_ignored_is_refused_before_the_search(
    make_problem: Any, make_strategy: Any, make_run: Any, make_refinement: Any, recipe: Recipe
) -> None:
    strategy = make_strategy(refinement=make_refinement())
    with pytest.raises(ValueError, match="OneShot has none: .* set strategy.refinement=null"):
        strategy.search(make_problem(OneShot()), make_run("logits"))
    problem, half = make_problem(Softmax()), replace(recipe, mixed_precision="bf16")
    strategy = make_strategy(refinement=make_refinement(recipe=half))
    with pytest.raises(ValueError, match="the search's precision, 'no' here; set precision=bf16"):
        strategy.search(problem, make_run("precision"))
    assert not any(make_run(name).checkpoint.exists() for name in ("logits", "precision"))
    with pytest.raises(ValueError, match="mixed_precision='bf16' in the recipe"):
        ShortTraining(problem, half, num_images=10)
    ShortTraining(replace(problem, accelerator=make_accelerator("bf16", "cpu")), half, 10)
    ShortTraining(replace(problem, accelerator=make_accelerator("bf16", "cpu")), recipe, 10)


# ---- the short training itself


def test_short_trainings_are_repeatable_and_longer_ones_are_better(
    make_problem: Any, recipe: Recipe
) -> None:
    problem = make_problem(Softmax())
    drawn = problem.space.sample(torch.Generator().manual_seed(1))
    judge = ShortTraining(problem, recipe, num_images=60)
    assert sum(len(labels) for _, labels in judge.judges) == 60
    first = judge.judge(drawn, 2)
    torch.manual_seed(77)
    assert ShortTraining(problem, recipe, num_images=60).judge(drawn, 2) == first
    assert judge.judge(drawn, 2, repeat=1) != first
    longer = judge.judge(drawn, 60)
    assert longer.loss < 0.9 * first.loss


def test_networks_are_trained_in_other_settings(
    make_problem: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(Softmax())
    problem.space = NasBench201(in_chans=1, img_size=8, widths=[4], num_cells=1)
    cell = problem.space.sample(torch.Generator().manual_seed(1))
    one, three = (ShortTraining(problem, recipe, 10, {"num_cells": n}) for n in (1, 3))
    built = list[int]()
    build = NasBench201.build_network

    def noted(self: NasBench201, *args: Any) -> Any:
        built.append(self.num_cells)
        return build(self, *args)

    monkeypatch.setattr(NasBench201, "build_network", noted)
    assert one.judge(cell, 2) == ShortTraining(problem, recipe, 10).judge(cell, 2)
    assert math.isfinite(three.judge(cell, 2).loss) and built == [1, 1, 3]
    with pytest.raises(ValueError, match="unexpected keyword argument 'cells'"):
        ShortTraining(problem, recipe, 10, {"cells": 3}).judge(cell, 2)


def test_a_short_training_sees_the_weight_half_augmented_and_is_judged_on_the_other(
    make_problem: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(Softmax())
    weight_half, arch_half = problem.data.search_splits(problem.seed)
    judge = ShortTraining(problem, recipe, num_images=10**6)
    assert sum(len(labels) for _, labels in judge.judges) == len(arch_half)
    shown = torch.cat([images for images, _ in judge.judges])
    plain = torch.cat([x for x, _ in Loader(arch_half, batch_size=10, seed=0, train=False)])
    assert torch.equal(shown.sum((1, 2, 3)).sort().values, plain.sum((1, 2, 3)).sort().values)

    requests, batch = list[Request](), MemorySource.batch

    def noted(self: MemorySource, request: Request, device: torch.device) -> Any:
        requests.append(request)
        return batch(self, request, device)

    monkeypatch.setattr(MemorySource, "batch", noted)
    judge.judge(problem.space.sample(torch.Generator().manual_seed(1)), len(weight_half) // 10)
    seen = np.concatenate([request.indices for request in requests])
    assert sorted(seen) == weight_half.indices.tolist()
    assert all(request.augment for request in requests)
