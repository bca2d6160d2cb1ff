"""What holds for every strategy that tries architectures, found among the configurations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

import supernet_conf
from latency.traced import TracedCost
from supernet.answer import Answer
from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.estimators.base import Estimate, Estimator
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.enas_micro import ENASMicro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.pnas import PNAS
from supernet.strategies import bayesian, trials
from supernet.strategies.base import Problem, Run
from supernet.strategies.random_search import RandomSearch
from supernet.strategies.trials import Proposals, Trials
from supernet.tracking import read_journal

FOLDER = Path(next(iter(supernet_conf.__path__))) / "strategy"
SMALL = {
    "aging_evolution": ["population=4", "sample_size=2"],
    "evolution": ["population=4", "num_parents=2", "num_mutations=2", "num_crossovers=1"],
    "evolution_ofa": ["population=4", "num_parents=2", "num_mutations=2", "num_crossovers=2"],
    "random_prefiltered": ["num_drawn=2"],
    "progressive": ["beam=12", "surrogate.epochs=2"],
}


@cache
def composed(name: str) -> DictConfig:
    """The strategy alone, which is quicker than all of a search's settings."""
    own = [f"strategy.{setting}" for setting in SMALL.get(name, [])]
    with initialize_config_module("supernet_conf", version_base="1.3"):
        return compose(f"strategy/{name}", ["+num_evaluations=12", "+max_seconds=null", *own])


def make(name: str, num_evaluations: int | None = 12) -> Any:
    cfg = composed(name)
    cfg.num_evaluations = num_evaluations
    return instantiate(cfg.strategy, _convert_="all")


NAMES = sorted(
    path.stem
    for path in FOLDER.glob("*.yaml")
    if issubclass(get_class(composed(path.stem).strategy._target_), Trials)
)


class Blocks(PNAS):
    """Small enough for twelve evaluations: ten cells have one block."""

    operations = ("sep_conv_3x3", "identity")


SPACES = {
    "mbconv": MBConv(
        in_chans=1, img_size=8, stem_chs=8, stem_stride=1, first_chs=8, stages=[[8, 4, 2]],
        kernels=[3, 5], expansions=[2], head_chs=16,
    ),
    "nasbench201": NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1),
    "darts": Darts(in_chans=1, img_size=8, width=2, num_cells=3),
    "enas_micro": ENASMicro(in_chans=1, img_size=8, width=2, num_cells=3, num_blocks=2),
    "pnas": Blocks(in_chans=1, img_size=8, width=2, num_cells=3, num_blocks=2),
}  # fmt: skip


def suits(name: str, space: SearchSpace) -> bool:
    try:
        make(name).check_space(space)
    except ValueError:
        return False
    return True


def suited(name: str) -> SearchSpace:
    """A space that a strategy can search."""
    return next(SPACES[s] for s in ("nasbench201", "pnas") if suits(name, SPACES[s]))


PROBLEMS: dict[Any, Problem] = {}


@pytest.fixture
def make_tried(make_tried: Any) -> Any:
    """Problems that differ in the estimator alone share the rest, which none of these changes."""

    def make(estimator: Estimator | None = None, **changes: Any) -> Problem:
        key = tuple(sorted(changes.items()))
        if key not in PROBLEMS:
            PROBLEMS[key] = make_tried(**changes)
        default = PROBLEMS[key].estimator
        return replace(PROBLEMS[key], estimator=estimator or default)

    return make


class Count(Estimator):
    """How many options differ from the first ones of all choices."""

    judge, judges_parts = "counting", True

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[Architecture] = []
        self.stop_at = stop_at

    def prepare(self, problem: Problem, run: Run, saved: Any) -> None:
        pass

    def estimate(self, architecture: Architecture) -> Estimate:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(architecture)
        choices = SearchSpace.of(architecture).choices
        wanted = sum(choice.options[0] != architecture[choice.name] for choice in choices)
        return Estimate(10.0 * wanted, 1.0 / (1 + wanted))


def test_there_are_such_strategies() -> None:
    assert {"random", "evolution", "aging_evolution", "reinforce", "bayesian", "grid"} <= {*NAMES}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", NAMES)
def test_each_judges_as_many_as_are_asked_for_all_within_the_budget(
    name: str, space: str, make_tried: Any, make_run: Any
) -> None:
    count, number = Count(), 12
    share = 0.8 if space == "mbconv" else 0.6
    problem = make_tried(estimator=count, space=SPACES[space], share=share)
    run, strategy = make_run(), make(name, number)
    if not suits(name, problem.space):
        with pytest.raises(ValueError, match="choose space="):
            strategy.search(problem, run)
        return
    answer = strategy.search(problem, run)
    assert len(set(count.asked)) == len(count.asked) == number
    whole = [a for a in count.asked if a.settings == problem.space.settings]
    assert all(problem.is_feasible(architecture) for architecture in whole)
    journal = read_journal(run.folder / "metrics.jsonl")
    judged = [record for record in journal if record["phase"] in ("rank", "part")]
    assert [record["architecture"] for record in judged] == [dict(a) for a in count.asked]
    assert all(record["judge"] == "counting" and not record["oracle"] for record in judged)
    records = [record for record in judged if record["phase"] == "rank"]
    assert len(records) == len(whole) > 0 and answer.num_judged == number
    assert all(record["costs"] == {"macs": record["cost"]} for record in records)
    best = answer.best(problem.objective.budget)
    assert answer.judged(best) == max(
        (record["accuracy"], record["loss"]) for record in records
    )


@pytest.mark.parametrize("stop_at", [0, 2, 7, 11])
@pytest.mark.parametrize("name", NAMES)
def test_each_goes_on_where_it_was_interrupted(
    name: str, stop_at: int, make_tried: Any, make_run: Any, check_resumes: Any
) -> None:
    space = suited(name)
    counts = []

    def search(run: Run) -> Answer:
        counts.append(Count())
        return make(name, 12).search(make_tried(estimator=counts[-1], space=space), run)

    whole = make_run("whole")
    best = search(whole).best(None)
    with pytest.raises(KeyboardInterrupt):
        cut = make_tried(estimator=Count(stop_at), space=space)
        make(name, 12).search(cut, make_run("cut"))
    again = make_run("cut", resume=True)
    assert search(again).best(None) == best
    assert counts[1].asked == counts[0].asked[stop_at:]
    one, other = ((run.folder / "metrics.jsonl").read_bytes() for run in (whole, again))
    assert one == other
    one, other = (load_checkpoint(run.checkpoint)["search"] for run in (whole, again))
    assert one == other
    search(make_run("cut", resume=True))
    assert counts[2].asked == []


@pytest.mark.parametrize("name", NAMES)
def test_each_depends_on_the_seed_alone(name: str, make_tried: Any, make_run: Any) -> None:
    asked = []
    for index, seed in enumerate((0, 0, 1)):
        count = Count()
        problem = make_tried(estimator=count, space=suited(name), seed=seed)
        make(name, 20).search(problem, make_run(str(index)))
        asked.append(count.asked)
    assert asked[0] == asked[1]
    assert (asked[0] != asked[2]) == (name != "grid")


@pytest.mark.parametrize("name", [n for n in NAMES if suits(n, SPACES["mbconv"])])
def test_each_ends_where_there_is_nothing_else(
    name: str, make_tried: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few architectures are within the budget. They are judged once each, or the search ends where
    proposal after proposal brings no other."""
    monkeypatch.setattr(trials, "MAX_REPEATS", 60)
    count = Count()
    problem = make_tried(estimator=count, share=0.8)
    make(name, 1000).search(problem, make_run())
    generator = torch.Generator().manual_seed(3)
    within = {problem.sampler().sample(generator) for _ in range(100)}
    assert 1 < len(within) < problem.space.size
    assert len(set(count.asked)) == len(count.asked) and set(count.asked) <= within
    # the one converges, the other proposes what its score likes best
    assert name in ("reinforce", "random_prefiltered") or set(count.asked) == within


def test_suggestions_that_are_all_out_of_bounds_give_way_to_a_draw(
    make_tried: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimiser that never comes upon the few that are within the budget."""
    problem = make_tried(estimator=Count(), share=0.8)
    worst = max((problem.space.sample(torch.Generator().manual_seed(n)) for n in range(50)),
                key=problem.cost.of)  # fmt: skip
    assert not problem.is_feasible(worst)
    real = bayesian._Parameters.suggest
    calls = []

    def suggest(self: Any, trial: Any) -> Architecture:
        calls.append(found := real(self, trial))
        return found if len(calls) % (bayesian.PATIENCE + 1) == 0 else worst

    monkeypatch.setattr(bayesian._Parameters, "suggest", suggest)
    make("bayesian", 2).search(problem, make_run())
    assert len(problem.estimator.asked) == 2 and len(calls) >= 2 * (bayesian.PATIENCE + 1)


@pytest.mark.parametrize("name", ["reinforce", "grid"])
def test_a_search_without_one_proposal_says_so(
    name: str, make_tried: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_tried(estimator=Count(), share=0.8)
    monkeypatch.setattr(Problem, "is_feasible", lambda *_: False)
    with pytest.raises(Infeasible, match="proposed no architecture within the space's constraints"):
        make(name, 3).search(problem, make_run())


class Hidden(Count):
    """Counts likewise, but by the loss alone: accuracies have the opposite order."""

    def estimate(self, architecture: Architecture) -> Estimate:
        accuracy = super().estimate(architecture).accuracy
        return Estimate(-accuracy, -accuracy)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "progressive"])
def test_each_goes_by_rewards_whatever_accuracies_are(
    name: str, make_tried: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for count in (Count(), Hidden()):
        problem, strategy = make_tried(estimator=count, space=SPACES["nasbench201"]), make(name, 18)
        if name == "reinforce":
            strategy.optimizer["lr"] = 0.03  # else it has learned nothing in so few steps
        if isinstance(count, Hidden):
            monkeypatch.setattr(type(problem.objective), "rank", lambda *given: given[2])
        answer = strategy.search(problem, make_run(type(count).__name__))
        asked.append([*count.asked, answer.best(None)])
    assert asked[0] == asked[1]


def test_an_optimiser_is_told_rewards_and_that_what_is_out_of_bounds_failed(
    make_tried: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = bayesian._import_optuna()
    told, tell = [], optuna.Study.tell

    def spy(self: Any, trial: Any, *values: float, **state: Any) -> Any:
        told.append((*values, *state.values()))
        return tell(self, trial, *values, **state)

    monkeypatch.setattr(optuna.Study, "tell", spy)
    problem = make_tried(estimator=Count(), space=SPACES["nasbench201"], share=0.6)
    monkeypatch.setattr(type(problem.objective), "rank", lambda _, accuracy, loss, cost: cost)
    make("bayesian").search(problem, make_run())
    costs = [problem.cost.of(architecture) for architecture in problem.estimator.asked]
    failed = (optuna.trial.TrialState.FAIL,)
    assert failed in told and [one for one in told if one != failed] == [(-c,) for c in costs]


def test_the_journal_has_all_costs(make_tried: Any, make_run: Any) -> None:
    problem, run = make_tried(estimator=Count(), share=1.0), make_run()
    problem = replace(problem, costs=(problem.cost, TracedCost("params", 10, (1, 1, 8, 8))))
    make("random", 2).search(problem, run)
    records = read_journal(run.folder / "metrics.jsonl")
    expected = [{c.name: c.of(a) for c in problem.costs} for a in problem.estimator.asked]
    assert [record["costs"] for record in records] == expected and "params" in expected[0]


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("random", 1000, "RandomSearch ended early: nothing that it proposed any more was new"),
        ("aging_evolution", 3, "AgingEvolution draws its first 4 architectures at random, and no"),
        ("evolution", 4, "Evolution draws its first 4 architectures at random, and no more than 4"),
        ("evolution", 5, None),
    ],
)
def test_a_search_that_is_not_what_was_asked_for_says_so(
    name: str, number: int, message: str | None, make_tried: Any, make_run: Any, caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(trials, "MAX_REPEATS", 60)
    make(name, number).search(make_tried(estimator=Count(), share=1.0), make_run())
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == (message is not None) and (message or "") in "".join(warned)


class Twice(Trials):
    """Proposes each architecture twice, and keeps what it is told."""

    def propose(self, problem: Problem, generator: Any) -> Proposals:
        sampler = problem.sampler()
        self.told = []
        while True:
            architecture = sampler.sample(generator)
            self.told.append((yield [architecture, architecture]))


def test_what_is_known_costs_nothing_and_is_told_again(make_tried: Any, make_run: Any) -> None:
    count, strategy = Count(), Twice(num_evaluations=3)
    strategy.search(make_tried(estimator=count, share=1.0), make_run())
    assert len(count.asked) == 3
    for one, other in strategy.told:
        assert one == other and one.reward == one.accuracy


def test_what_is_out_of_bounds_is_never_judged(make_tried: Any, make_run: Any) -> None:
    class Wrong(RandomSearch):
        def propose(self, problem: Problem, generator: Any) -> Proposals:
            yield [max((problem.space.sample(generator) for _ in range(50)), key=problem.cost.of)]

    with pytest.raises(AssertionError, match="out of bounds"):
        Wrong(num_evaluations=1).search(make_tried(estimator=Count(), share=0.8), make_run())
