"""The monitor of collapse, and the curvature that it may ask for."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from latency.model import macs_cost
from latency.sites import trace
from supernet.checkpoint import load_checkpoint
from supernet.mixed_ops.base import MixedOp, PathWeights
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.sigmoid import Sigmoid
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
from supernet.outcome import OnTarget, conclude
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.base import Run
from supernet.strategies.curvature import curvature, largest_eigenvalue
from supernet.strategies.epoch_log import EpochLog, parameter_free
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.monitor import Monitor
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal

SGD = {"opt": "sgd", "lr": 0.1}
QUIET: dict[str, Any] = {"max_skip_share": None, "max_none_share": None}


def make_state(problem: Any, batch_size: int = 10) -> SearchState:
    return SearchState(problem, batch_size, SGD, SGD, 0.5, torch.contiguous_format)


# ---- what is recorded


def test_shares_and_entropy_against_hand_computation(make_problem, make_run) -> None:
    """Three quarters of `zero` in the one choice that has it, the other one undecided."""
    problem = make_problem(Softmax(), share=1.0)
    state = make_state(problem)
    first, second = problem.space.choices
    assert second.options[-1] == "zero" and len(second.options) == 3 and len(first.options) == 2
    with torch.no_grad():
        state.parameters()[first.name].zero_()
        state.parameters()[second.name].copy_(torch.tensor([1.0, 1.0, 6.0]).log())
    state.weight_meter.sums += 1.0
    record = EpochLog(state, make_run(), 1).end_epoch(0, searching=False)
    p = [0.125, 0.125, 0.75]
    entropy = -sum(value * math.log(value) for value in p) / math.log(3)
    assert record["entropy"] == pytest.approx((1 + entropy) / 2, abs=1e-6)
    for prefix in ("", "derived_"):
        assert record[f"{prefix}skip_share"] == record[f"{prefix}free_share"] == 0.5
        assert record[f"{prefix}none_share"] == 0.0


def test_parameter_free_candidates_of_a_cell() -> None:
    space = NasBench201(widths=(4,), num_cells=1)
    free = {"none", "skip_connect", "avg_pool_3x3"}
    expected = {(choice.name, option) for choice in space.choices for option in free}
    assert parameter_free(space.build_supernet(10)) == expected
    assert space.none_options == {"none"} and space.none_options < space.skip_options


DARTS = {"in_chans": 1, "img_size": 8, "width": 2, "num_cells": 3}
CELLS = {"in_chans": 1, "img_size": 8, "widths": (4,), "num_cells": 1}
NONE, SKIP, CONV = "none", "skip_connect", "nor_conv_3x3"


@pytest.mark.parametrize(
    ("space", "options", "skips", "nones", "rule"),
    [
        (Darts(**DARTS), [SKIP] * 28, 1.0, 0.0, "skip"),
        (Darts(**DARTS), [SKIP] * 14 + ["sep_conv_3x3"] * 14, 0.5, 0.0, None),
        (NasBench201(**CELLS), [SKIP] * 6, 1.0, 0.0, "skip"),
        (NasBench201(**CELLS), [NONE] * 2 + [SKIP] * 4, 1.0, 1 / 3, "skip"),
        (NasBench201(**CELLS), [CONV] * 2 + [NONE, CONV] * 2, 1 / 3, 1 / 3, None),
        (NasBench201(**CELLS), [NONE] * 3 + [CONV] + [NONE] * 2, 5 / 6, 5 / 6, "skip"),
        (NasBench201(**CELLS), [NONE, CONV] * 2 + [NONE] * 2, 2 / 3, 2 / 3, "none"),
    ],
)  # fmt: skip
def test_shares_are_of_the_choices_that_are_there(
    space: SearchSpace, options: list[str], skips: float, nones: float, rule: str | None,
    make_problem, make_run,
) -> None:  # fmt: skip
    """A cell of `darts` leaves 12 of 28 edges out, whatever is found; a `none` of NAS-Bench-201 is
    a choice like the others. At the default bounds, 0.75 and 0.5."""
    problem, run = make_problem(Softmax()), make_run()
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 8, 8))
    cost, objective = macs_cost(space.choices, sites), TaskOnly(cost="macs")
    supernet = space.build_supernet(10, problem.relaxation.build)
    problem = replace(problem, space=space, supernet=supernet, cost=cost, objective=objective)
    state = make_state(problem)
    with torch.no_grad():
        for choice, option in zip(space.choices, options, strict=True):
            state.parameters()[choice.name].zero_()[choice.index(option)] = 5.0
    state.weight_meter.sums += 1.0
    record = EpochLog(state, run, 1).end_epoch(0, searching=False)
    for prefix in ("", "derived_"):
        assert record[f"{prefix}skip_share"] == pytest.approx(skips)
        assert record[f"{prefix}none_share"] == pytest.approx(nones)
    Monitor().judge(state, run, record)
    broken = [line["rule"] for line in read_journal(run.folder / "metrics.jsonl")[1:]]
    assert broken == ([] if rule is None else [rule])


# ---- the curvature


@pytest.mark.parametrize("size", [1, 5, 40])
def test_lanczos_finds_the_largest_eigenvalue(size: int) -> None:
    """Of matrices whose eigenvalue farthest from zero is negative, too."""
    torch.manual_seed(size)
    base = torch.randn(size, size, dtype=torch.float64)
    matrix = base + base.T - torch.eye(size)
    exact = float(torch.linalg.eigvalsh(matrix)[-1])
    assert largest_eigenvalue(matrix.mv, size, size) == pytest.approx(exact, rel=1e-9, abs=1e-9)
    assert largest_eigenvalue(matrix.mv, size, 25) == pytest.approx(exact, rel=1e-3)


def test_lanczos_ends_where_nothing_is_left() -> None:
    assert largest_eigenvalue(lambda v: 3 * v, 10, 10) == pytest.approx(3)
    assert largest_eigenvalue(torch.zeros_like, 10, 10) == 0


@pytest.mark.parametrize("relaxation", [Softmax(), Sigmoid()], ids=["softmax", "sigmoid"])
def test_curvature_is_that_of_the_exact_hessian(relaxation: Any, make_problem) -> None:
    problem = make_problem(relaxation)
    problem.supernet.double()
    state = make_state(problem, batch_size=24)
    state.parameters.double()
    batch = [t.double() if t.is_floating_point() else t
             for t in state.arch_stream.loader.batch(0, 0)]  # fmt: skip
    state.arch_stream.loader.batch = lambda epoch, index: batch  # type: ignore[method-assign]
    problem.supernet.train()
    twin = copy.deepcopy(problem.supernet)
    before = copy.deepcopy(problem.supernet.state_dict())
    names = list(state.parameters())

    def loss(*logits: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, logits, strict=True))
        gates = torch.sigmoid if isinstance(relaxation, Sigmoid) else (lambda v: v.softmax(0))
        paths = {n: PathWeights(tuple(range(len(v))), gates(v)) for n, v in given.items()}
        return cross_entropy(twin(batch[0], paths), batch[1])

    leaves = tuple(v.detach().clone() for v in state.parameters().values())
    blocks = torch.autograd.functional.hessian(loss, leaves)
    hessian = torch.cat([torch.cat(list(row), dim=1) for row in blocks])
    exact = float(torch.linalg.eigvalsh(hessian)[-1])
    size = sum(map(len, leaves))
    found = curvature(state, torch.contiguous_format, size)
    assert exact > 0 and found == pytest.approx(exact, rel=1e-7)
    for key, value in problem.supernet.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad and p.grad is None for p in problem.supernet.parameters())


def test_curvature_leaves_the_search_as_it_is(make_problem, make_run, make_strategy) -> None:
    def search(name: str, **changes: Any) -> list[dict[str, Any]]:
        run = make_run(name)
        monitor = Monitor(**QUIET, **changes)
        make_strategy(monitor=monitor).search(make_problem(Softmax()), run)
        return read_journal(run.folder / "metrics.jsonl")

    plain, watched = search("plain"), search("watched", curvature_every=1, iterations=3)
    assert [r.pop("curvature", None) is None for r in watched] == [True, False, False]
    assert watched == plain


def test_curvature_needs_a_mixture_of_all(make_problem, make_run, make_strategy) -> None:
    strategy = make_strategy(monitor=Monitor(curvature_every=1))
    with pytest.raises(ValueError, match="needs a mixed op in which every .*not BinaryGate"):
        strategy.search(make_problem(BinaryGate()), make_run())
    make_strategy(monitor=Monitor()).search(make_problem(BinaryGate()), make_run())


# ---- the rules


class Tale(Monitor):
    """Reads shares of skips and curvatures, by epoch from 1, instead of measuring them."""

    def __init__(self, told: Sequence[tuple[float, float | None]], **settings: Any) -> None:
        super().__init__(**settings)
        self.told = told

    def measure(self, state: SearchState, epoch: int, memory_format: Any) -> dict[str, float]:
        skips, found = self.told[epoch]
        if found is None:
            return {"derived_skip_share": skips}
        state.monitor.curvatures.append((epoch + 1, found))
        return {"derived_skip_share": skips, "curvature": found}


def growing(at: int, epochs: int) -> list[tuple[float, float | None]]:
    """The curvature is 1, and 2 from an epoch on."""
    return [(0.0, 2.0 if epoch >= at else 1.0) for epoch in range(1, epochs + 1)]


def watch(
    strategy: Any, problem: Any, run: Run, monitor: Monitor
) -> tuple[list[dict[str, Any]], Any]:
    """(lines of the journal, answer) of a search of as many epochs as are told."""
    strategy.monitor = monitor
    answer = strategy.search(problem, run)
    return read_journal(run.folder / "metrics.jsonl"), answer


def test_a_warning_is_one_line_a_rule_and_the_search_goes_on(
    make_problem, make_run, make_strategy, caplog: pytest.LogCaptureFixture
) -> None:
    told = [(0.0, None), (0.8, None), (0.9, None), (1.0, None)]
    strategy = make_strategy(epochs=4, warmup_epochs=0)
    lines, _ = watch(strategy, make_problem(Softmax()), make_run(), Tale(told))
    assert [r["epoch"] for r in lines if r["phase"] == "search"] == [1, 2, 3, 4]
    (line,) = [r for r in lines if r["phase"] == "monitor"]
    assert line["epoch"] == 2 and line["rule"] == "skip" and line["action"] == "warn"
    assert caplog.text.count("collapse: 80% of the derived architecture's choices compute") == 1


def test_stop_ends_the_search_where_it_is(make_problem, make_run, make_strategy) -> None:
    told = [(0.0, None), (0.5, None), (0.8, None), (1.0, None)]
    run, strategy = make_run(), make_strategy(epochs=4, warmup_epochs=0)
    monitor = Tale(told, action="stop")
    lines, answer = watch(strategy, make_problem(Softmax()), run, monitor)
    assert [r["phase"] for r in lines] == ["search"] * 3 + ["monitor"]
    assert dict(answer.best(None)) == dict(_argmax(lines[2]))
    again, same = watch(strategy, make_problem(Softmax()), make_run(resume=True), monitor)
    assert again == lines and same.best(None) == answer.best(None)


def _argmax(record: dict[str, Any]) -> dict[str, str]:
    """By hand: no constraint binds, `zero` against all others together (`MBConv.scores`)."""
    options = {"stage1_0": ("k3_e2", "k5_e2"), "stage1_1": ("k3_e2", "k5_e2", "zero")}
    found = {}
    for name, p in record["probabilities"].items():
        kept = p[:2] if len(p) == 2 or p[0] + p[1] > p[2] else p
        found[name] = options[name][max(range(len(kept)), key=kept.__getitem__)]
    return found


@pytest.mark.parametrize(
    ("told", "settings", "good"),
    [
        ([(0.0, None), (0.5, None), (0.8, None)], {}, 2),
        (growing(at=4, epochs=6), {"curvature_every": 1, "window": 1, "lag": 3}, 1),
        (growing(at=4, epochs=6), {"curvature_every": 1, "window": 2, "lag": 2}, 2),
    ],
)
def test_rollback_answers_with_the_last_good_epoch(
    told: Any, settings: dict[str, Any], good: int, make_problem, make_run, make_strategy
) -> None:
    run = make_run()
    strategy = make_strategy(epochs=len(told), warmup_epochs=0)
    problem = make_problem(Softmax())
    monitor = Tale(told, action="rollback", **settings)
    lines, answer = watch(strategy, problem, run, monitor)
    assert lines[-1]["phase"] == "monitor" and lines[-1]["good_epoch"] == good
    assert lines[-1]["epoch"] > good
    # as a search that never went on
    alone, shorter = make_run("alone"), make_problem(Softmax())

    class Stopping(FirstOrder):
        def architecture_step(self, state: SearchState, progress: float) -> None:
            super().architecture_step(state, progress)
            if state.step == good * len(state.weight_stream.loader):
                state.monitor.over = True

    same = make_strategy(cls=Stopping, epochs=len(told), warmup_epochs=0, monitor=Monitor(**QUIET))
    expected = same.search(shorter, alone)
    assert answer.scores.keys() == expected.scores.keys()
    assert all(torch.equal(v, expected.scores[k]) for k, v in answer.scores.items())
    states = [load_checkpoint(r.checkpoint)["search"] for r in (run, alone)]
    for part in ("supernet", "logits"):
        assert all(torch.equal(v, states[1][part][k]) for k, v in states[0][part].items())
    momenta = [state["weight_optimizer"]["state"] for state in states]
    assert len(momenta[0]) == len(list(problem.supernet.parameters()))
    for key, moment in momenta[0].items():
        assert torch.equal(moment["momentum_buffer"], momenta[1][key]["momentum_buffer"]), key
    for key, value in problem.supernet.state_dict().items():
        assert torch.equal(value, shorter.supernet.state_dict()[key]), key


def test_the_result_expects_what_the_last_good_epoch_did(
    make_problem, make_run, make_strategy
) -> None:
    run, told = make_run(), [(0.0, None), (0.5, None), (0.8, None)]
    problem = make_problem(Softmax(), uppers={"params": 1600.0})
    strategy, target = make_strategy(epochs=3, warmup_epochs=0), OnTarget(None, None, None)
    lines, answer = watch(strategy, problem, run, Tale(told, action="rollback"))
    expected = [line["limits"]["params"]["expected"] for line in lines[:3]]
    assert lines[3]["good_epoch"] == 2 and expected[1] != expected[2]
    result = conclude(problem, run, answer, target, bn_batches=1)
    assert result["limits"]["params"]["expected"] == expected[1]


def test_curvature_rule_against_its_formula(make_problem, make_run) -> None:
    """Mean of the last two against that of the two three before, by hand: 1.5 / 1 at the sixth,
    2 / 1 at the seventh."""
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    for growth, epoch in ((1.4, 6), (1.6, 7), (2.1, None)):
        state, run = make_state(make_problem(Softmax())), make_run(f"growth {growth}")
        monitor = Monitor(window=2, lag=3, max_growth=growth, curvature_every=1, **QUIET)
        for number, value in enumerate(values, start=1):
            state.monitor.curvatures.append((number, value))
            shares = {"derived_skip_share": 1.0, "derived_none_share": 1.0}
            monitor.judge(state, run, {"epoch": number, "curvature": value, **shares})
        lines = read_journal(run.folder / "metrics.jsonl")
        assert [line["epoch"] for line in lines] == ([epoch] if epoch else [])


def test_without_a_good_epoch_a_rollback_is_a_stop(
    make_problem, make_run, make_strategy, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = make_strategy(epochs=3, warmup_epochs=0)
    monitor = Tale([(1.0, None)] * 3, action="rollback")
    lines, _ = watch(strategy, make_problem(Softmax()), make_run(), monitor)
    assert [r["phase"] for r in lines] == ["search", "monitor"]
    assert lines[-1]["good_epoch"] is None and "no good epoch to go back to" in caplog.text


@pytest.mark.parametrize(
    ("action", "stop_after"), [("warn", 17), ("warn", 23), ("rollback", 14), ("rollback", 25)]
)
def test_an_interrupted_search_ends_alike(
    action: str, stop_after: int, make_problem, make_run, make_strategy
) -> None:
    """The curvature, really measured, grows by any factor above 1e-9 of what it was."""
    settings: dict[str, Any] = {
        "action": action, "curvature_every": 1, "window": 1, "lag": 2, "iterations": 2, **QUIET,
    }  # fmt: skip

    class Cut(FirstOrder):
        def weight_step(self, state: SearchState, progress: float) -> None:
            if state.step == stop_after:
                raise KeyboardInterrupt
            super().weight_step(state, progress)

    def search(run: Run, cls: type[FirstOrder] = FirstOrder) -> Any:
        monitor = Monitor(**settings)
        monitor.max_growth = 1e-9
        strategy = make_strategy(cls=cls, epochs=5, warmup_epochs=1, monitor=monitor)
        strategy.search(make_problem(Softmax()), run)
        state = load_checkpoint(run.checkpoint)["search"]
        tensors = {**state["supernet"], **state["logits"]}
        return (run.folder / "metrics.jsonl").read_text(), state["monitor"], tensors

    whole = search(make_run("whole", checkpoint_every=4))
    assert '"phase": "monitor"' in whole[0] and whole[1]["over"] == (action == "rollback")
    cut = make_run("cut", checkpoint_every=4)
    if action == "rollback" and stop_after == 25:  # it has ended by then
        search(cut, Cut)
    else:
        with pytest.raises(KeyboardInterrupt):
            search(cut, Cut)
    resumed = search(make_run("cut", resume=True, checkpoint_every=4))
    assert resumed[:2] == whole[:2]
    assert all(torch.equal(v, whole[2][k]) for k, v in resumed[2].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "panic"}, "action='panic' is unknown; valid: warn, stop, rollback"),
        ({"window": 0}, "window must be 1 or more; got 0"),
        ({"max_growth": 0.5}, "max_growth must be 1 or more; got 0.5"),
        ({"curvature_every": -1}, "curvature_every must be 0 or more; got -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(**settings)
