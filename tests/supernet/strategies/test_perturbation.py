"""Selection by perturbation against the paper's rule, by hand and on a problem that is solved."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from latency.model import macs_cost
from latency.sites import trace
from supernet.checkpoint import load_checkpoint
from supernet.data.digits import Digits
from supernet.derive import is_feasible, reachable
from supernet.engine import make_accelerator
from supernet.limits import Disagreement, Limit
from supernet.mixed_ops.base import MixedOp, PathWeights
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import Budget, TaskOnly
from supernet.spaces.darts import EDGES, KINDS, NODES, NONE, OPERATIONS, Darts, choice_name
from supernet.spaces.nasbench201 import Cell, NasBench201
from supernet.strategies.base import Problem
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.perturbation import Perturbation, selectable
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal

SGD = {"opt": "sgd", "lr": 0.1}
NEVER: Any = None


def make(**changes: Any) -> Perturbation:
    return Perturbation(**{"steps": 2, "lr": 0.02, "num_images": 30, **changes})


class Known(Perturbation):
    """The accuracy is a known function of what is left: the sum of the values of the options."""

    def __init__(self, values: dict[tuple[str, str], float]) -> None:
        super().__init__(steps=0, lr=0.1, num_images=1)
        self.values, self.asked = values, list[tuple[str, str]]()

    def accuracy(self, state, choice, option, judges) -> tuple[float, float]:
        self.asked.append((choice.name, option))
        return -self.values[choice.name, option], 0.0


def make_state(problem: Any) -> SearchState:
    return SearchState(problem, 12, SGD, SGD, 1.0, torch.contiguous_format)


TRIED = ("max_pool_3x3", "skip_connect", "sep_conv_3x3")  # the others would take time


def darts(problem: Problem, share: float | None = None) -> Problem:
    """The smallest network of these cells, within a share of its range of MACs."""
    space = Darts(in_chans=1, img_size=8, width=2, num_cells=3)
    space.exclude([f"*={option}" for option in OPERATIONS if option not in (NONE, *TRIED)])
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 8, 8))
    cost, objective = macs_cost(space.choices, sites), TaskOnly(cost="macs")
    if share is not None:
        objective = Budget(cost="macs", budget_share=share)
        objective.prepare(reachable(space, cost), cost.unit)
    supernet = space.build_supernet(10, problem.relaxation.build)
    return replace(problem, space=space, supernet=supernet, cost=cost, objective=objective)


def made_up(seed: int) -> dict[tuple[str, str], float]:
    """What each operation of each edge is worth; `none`, nothing."""
    generator = torch.Generator().manual_seed(seed)
    names = [choice_name(kind, *edge) for kind in KINDS for edge in EDGES]
    pairs = list(itertools.product(names, OPERATIONS))
    drawn = torch.rand(len(pairs), generator=generator).tolist()
    return {pair: value * (pair[1] != NONE) for pair, value in zip(pairs, drawn, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_node_keeps_the_two_edges_whose_loss_hurts_most(
    seed: int, make_problem, make_run
) -> None:
    """Each with the operation whose loss hurts most, in whatever order they are visited."""
    problem, values = darts(make_problem(Softmax(), seed=seed)), made_up(seed=7)
    state, run = make_state(problem), make_run()
    Known(values).select(state, run, NEVER)
    for kind, node in itertools.product(KINDS, NODES):
        names = [choice_name(kind, source, node) for source in range(node)]
        best = {name: max(TRIED, key=lambda o: values[name, o]) for name in names}
        kept = sorted(names, key=lambda name: -values[name, best[name]])[:2]
        for name in names:
            assert state.selected[name] == (best[name] if name in kept else NONE), name
    lines = read_journal(run.folder / "metrics.jsonl")
    nodes = [line for line in lines if "dropped" in line]
    assert all("choice" in line for line in lines[:28]) and lines[28:] == nodes
    # node 2 has two edges, and no more
    assert sorted(len(line["dropped"]) for line in nodes) == [1, 1, 2, 2, 3, 3]
    assert all(
        [len(tried) for tried in line["without"]] == list(range(len(line["edges"]), 2, -1))
        for line in nodes
    )


@pytest.mark.slow
def test_edges_are_dropped_until_the_budget_can_be_met(make_problem, make_run) -> None:
    """The dearest operations are the most valued."""
    problem = darts(make_problem(Softmax()), share=0.3)
    values = {
        (c.name, o): float(problem.cost.per_option[c.name][c.index(o)])
        for c in problem.space.choices
        for o in c.options
    }
    state = make_state(problem)
    Known(values).select(state, make_run(), NEVER)
    found, budget = problem.space.architecture(state.selected), problem.objective.budget
    assert problem.space.is_valid(found) and 0.9 * budget < problem.cost.of(found) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", [3, 30])
def test_an_interrupted_selection_of_edges_goes_on(fail_at: int, make_problem, make_run) -> None:
    """At the fourth choice, and at a node (which come after the 28 choices)."""
    values = made_up(seed=3)

    class Cut(Known):
        def _end_decision(self, state: SearchState, run: Any, record: Any) -> None:
            if state.decided == fail_at:
                raise KeyboardInterrupt
            super()._end_decision(state, run, record)

    def select(cls: type[Known], run: Any) -> SearchState:
        state = make_state(darts(make_problem(Softmax())))
        if (saved := run.load()) is not None:
            state.load_state_dict(saved)
        cls(values).select(state, run, NEVER)
        return state

    whole, cut = make_run("whole"), make_run("cut")
    expected = select(Known, whole)
    with pytest.raises(KeyboardInterrupt):
        select(Cut, cut)
    found = select(Known, make_run("cut", resume=True))
    assert found.selected == expected.selected and found.decided == expected.decided == 34
    texts = [(run.folder / "metrics.jsonl").read_text() for run in (whole, cut)]
    assert texts[0] == texts[1]


def test_an_edge_is_dropped_in_the_supernet(make_problem) -> None:
    """A settled operation is tried against nothing in its place, the other choices as they are."""
    problem = darts(make_problem(Softmax()))
    state, twin = make_state(problem), copy.deepcopy(problem.supernet).train()
    problem.supernet.train()
    state.selected = {"normal_0_3": "sep_conv_3x3", "normal_1_3": "skip_connect"}
    images, labels = state.arch_stream.loader.batch(0, 0)
    paths = {
        n: PathWeights(tuple(range(8)), v.detach().softmax(0))
        for n, v in state.parameters().items()
    }
    for name, option in {"normal_0_3": NONE, "normal_1_3": "skip_connect"}.items():
        paths[name] = PathWeights((OPERATIONS.index(option),))
    with torch.no_grad():
        expected = float(cross_entropy(twin(images, paths), labels))
    choice = problem.space.by_name["normal_0_3"]
    _, loss = make().accuracy(state, choice, "sep_conv_3x3", [(images, labels)])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_option_whose_loss_hurts_most_stays(make_problem, make_run) -> None:
    """Whatever the logits say; choices come in random order, each once."""
    problem = make_problem(Softmax(), share=1.0)
    best = {"stage1_0": "k5_e2", "stage1_1": "k3_e2"}
    pairs = [(c.name, o) for c in problem.space.choices for o in c.options]
    values = {pair: float(best[pair[0]] == pair[1]) for pair in pairs}
    for logits_like in ("k3_e2", "k5_e2"):
        state, known = make_state(problem), Known(values)
        with torch.no_grad():
            for choice in problem.space.choices:
                state.parameters()[choice.name][choice.index(logits_like)] += 5
        known.select(state, make_run(logits_like), NEVER)
        assert state.selected == best
        assert sorted(known.asked) == sorted(pairs)
    names = {seed: _order(make_problem, make_run, values, seed) for seed in range(6)}
    assert len(set(names.values())) == 2


def _order(make_problem, make_run, values, seed: int) -> tuple[str, ...]:
    state = make_state(make_problem(Softmax(), share=1.0, seed=seed))
    Known(values).select(state, make_run(f"seed {seed}"), NEVER)
    return tuple(state.selected)


@pytest.mark.parametrize("share", [0.67, 0.75, 0.9])
def test_only_what_can_be_completed_is_chosen(share: float, make_problem, make_run) -> None:
    """The dearest options are the most valued, and yet the outcome is within the budget."""
    problem = make_problem(Softmax(), share=share)
    values = {
        (c.name, o): float(problem.cost.per_option[c.name][c.index(o)])
        for c in problem.space.choices
        for o in c.options
    }
    state = make_state(problem)
    Known(values).select(state, make_run(), NEVER)
    found = problem.space.architecture(state.selected)
    budget = problem.objective.budget
    assert problem.space.is_valid(found) and problem.cost.of(found) <= budget
    every = itertools.product(*(c.options for c in problem.space.choices))
    names = [c.name for c in problem.space.choices]
    within = [a for o in every if problem.cost.of(
        a := problem.space.architecture(dict(zip(names, o, strict=True)))) <= budget]  # fmt: skip
    first = problem.space.by_name[next(iter(state.selected))]
    possible = {a[first.name] for a in within}
    assert set(selectable(problem, {}, first)) == possible
    assert state.selected[first.name] == max(possible, key=lambda o: values[first.name, o])


def test_a_cell_stays_connected() -> None:
    """Five of six edges are `none`: of the last one nothing but what joins input and output."""
    space = NasBench201(widths=(4,), num_cells=1)
    settled = {c.name: "none" for c in space.choices if c.name != "edge_0_3"}
    for option in space.by_name["edge_0_3"].options:
        bound = Limit(Disagreement(only({**settled, "edge_0_3": option})), 0)
        assert is_feasible(space, [bound]) == (option != "none")
    architecture = space.architecture({**settled, "edge_0_3": "skip_connect"})
    assert Disagreement(only(settled)).of(architecture) == 0
    assert Disagreement(only({**settled, "edge_0_3": "none"})).of(architecture) == 1
    assert Disagreement({"edge_0_3": ("none", "skip_connect")}).of(architecture) == 0


def only(settled: dict[str, str]) -> dict[str, tuple[str]]:
    return {name: (option,) for name, option in settled.items()}


def cells() -> Problem:
    torch.manual_seed(0)
    space = NasBench201(in_chans=1, img_size=8, widths=(4,), num_cells=1)
    data, relaxation, cost = Digits(img_size=8, pad=1, train_limit=120), Softmax(), NEVER
    supernet = space.build_supernet(10, relaxation.build)
    accelerator, objective = make_accelerator("no", "cpu"), TaskOnly(cost="macs")
    return Problem(space, supernet, relaxation, objective, cost, data, accelerator, 0)


def test_the_whole_rule_against_plain_loops(make_run) -> None:
    """Cells computed edge by edge, probabilities by hand, batch statistics, zero for an option."""
    problem = cells()
    state, run = make_state(problem), make_run()
    twin = copy.deepcopy(problem.supernet).train()
    for module in twin.modules():
        if isinstance(module, Cell):
            module.joint = False
    make(steps=0, num_images=24).select(state, run, NEVER)
    lines = read_journal(run.folder / "metrics.jsonl")
    order = [line["choice"] for line in lines]
    assert sorted(order) == sorted(c.name for c in problem.space.choices)
    loader = state.arch_stream.loader
    loader.augment = False
    batches = [loader.batch(0, index) for index in range(2)]
    values = {n: v.detach().softmax(0) for n, v in state.parameters().items()}
    for line in lines:
        name, options = line["choice"], problem.space.by_name[line["choice"]].options
        for option, figures in line["without"].items():
            tried = {**values, name: values[name].clone()}
            tried[name][options.index(option)] = 0.0
            paths = {n: PathWeights(tuple(range(5)), v) for n, v in tried.items()}
            with torch.no_grad():
                outputs = [(twin(x, paths), y) for x, y in batches]
            right = sum(int((o.argmax(1) == y).sum()) for o, y in outputs)
            loss = sum(float(cross_entropy(o, y, reduction="sum")) for o, y in outputs)
            assert figures["accuracy"] == pytest.approx(100 * right / 24)
            assert figures["loss"] == pytest.approx(loss / 24, rel=1e-4)
        hurts = {o: (-f["accuracy"], f["loss"]) for o, f in line["without"].items()}
        assert line["option"] == max(hurts, key=lambda o: hurts[o])
        values[name] = torch.eye(5)[options.index(line["option"])]


def test_statistics_and_logits_stay_and_weights_get_used_to_it(
    make_problem, make_run, make_strategy
) -> None:
    problem, run = make_problem(Softmax()), make_run()
    ran: list[dict[str, Any]] = []

    class Watching(FirstOrder):
        def weight_step(self, state: SearchState, progress: float, fixed: Any = None) -> None:
            before = copy.deepcopy(state.parameters.state_dict())
            super().weight_step(state, progress, fixed)
            if fixed is not None:
                rate = state.weight_optimizer.param_groups[0]["lr"]
                ran.append({"fixed": set(fixed), "rate": rate})
                after = state.parameters.state_dict()
                assert all(torch.equal(v, before[k]) for k, v in after.items())

    answer = make_strategy(cls=Watching, selection=make()).search(problem, run)
    lines = [x for x in read_journal(run.folder / "metrics.jsonl") if x["phase"] == "select"]
    assert ran == [{"fixed": {lines[0]["choice"]}, "rate": 0.02}] * 2
    assert [line["step"] for line in lines] == [15, 17] and lines[0]["train_loss"] is None
    assert lines[1]["train_loss"] > 0
    found = answer.best(problem.objective.budget)
    assert dict(found) == {line["choice"]: line["option"] for line in lines}
    tighter = problem.cost.of(found) - 1
    assert problem.cost.of(answer.best(tighter)) <= tighter  # by the logits


@pytest.mark.parametrize("stop_after", [14, 17])
def test_an_interrupted_selection_goes_on(
    stop_after: int, make_problem, make_run, make_strategy
) -> None:
    """Steps 0 to 14 are the search, 15 to 17 the weights' after the first of two choices."""
    done = 0

    class Cut(FirstOrder):
        def weight_step(self, state: SearchState, progress: float, fixed: Any = None) -> None:
            nonlocal done
            if done == stop_after:
                raise KeyboardInterrupt
            done += 1
            super().weight_step(state, progress, fixed)

    def search(run: Any, cls: type[FirstOrder] = FirstOrder) -> Any:
        strategy = make_strategy(cls=cls, selection=make(steps=3))
        best = strategy.search(make_problem(Softmax()), run).best(None)
        state = load_checkpoint(run.checkpoint)["search"]
        return best, (run.folder / "metrics.jsonl").read_text(), state["supernet"]

    whole = search(make_run("whole", checkpoint_every=2))
    with pytest.raises(KeyboardInterrupt):
        search(make_run("cut", checkpoint_every=2), Cut)
    for _ in range(2):  # the second time there is nothing left to do
        again = search(make_run("cut", resume=True, checkpoint_every=2))
        assert again[:2] == whole[:2]
        assert all(torch.equal(v, whole[2][k]) for k, v in again[2].items())


def test_what_does_not_fit_is_refused(make_problem, make_run, make_strategy) -> None:
    with pytest.raises(ValueError, match="in which every candidate runs .*not BinaryGate"):
        make_strategy(selection=make()).search(make_problem(BinaryGate()), make_run())
    for name, value in (("steps", -1), ("lr", 0.0), ("num_images", 0)):
        with pytest.raises(ValueError, match=f"selection.{name} must be"):
            make(**{name: value})
