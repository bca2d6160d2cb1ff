from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latency import runner
from latency.runner import (
    MAX_CALLS,
    MIN_FOR_CI,
    REFERENCE,
    REFERENCE_EVERY,
    Journal,
    Plan,
    Row,
    Timer,
    burst,
    calls_per_burst,
    check_row,
    corrected,
    round_order,
    run_rounds,
    statistics,
    summarize,
)

SOURCE = Path(runner.__file__)
NOWHERE = Journal(None, {})
SINGLE = {"burst_ms": 0.0, "warmup": 1}  # nothing is called but the bursts


class Device:
    """Operations that take `ms`, times the speed the device has at the moment, times noise.

    Args:
        ms: of each operation and, last, of the reference.
        slowness: (number of the burst) -> factor.
        noise: standard deviation of the logarithm, one for all or one an operation.
    """

    def __init__(
        self,
        ms: list[float],
        slowness: Callable[[int], float] = lambda burst: 1.0,
        noise: float | list[float] = 0.0,
        seed: int = 0,
    ) -> None:
        self.ms, self.slowness = ms, slowness
        self.noise = noise if isinstance(noise, list) else [noise] * len(ms)
        self.rng = np.random.default_rng(seed)
        self.bursts: list[int] = []  # positions, in order
        self.seconds = 0.0

    def timer(self, which: int) -> Timer:
        def timer(num_calls: int) -> float:
            factor = self.slowness(len(self.bursts))
            ms = self.ms[which] * factor * np.exp(self.noise[which] * self.rng.standard_normal())
            self.bursts.append(which)
            self.seconds += num_calls * ms / 1e3
            return float(ms)

        return timer

    def run(self, plan: Plan, journal: Journal = NOWHERE) -> tuple[list[Row], str]:
        *timers, reference = (self.timer(which) for which in range(len(self.ms)))
        return run_rounds(timers, reference, plan, journal)


# ---- drift


def switching(num_bursts: int, factor: float, seed: int) -> Callable[[int], float]:
    """A device that changes between two speeds every 20 to 120 bursts."""
    rng = np.random.default_rng(seed)
    states: list[float] = []
    while len(states) < num_bursts:
        states += [1.0] * int(rng.integers(20, 120)) + [factor] * int(rng.integers(20, 120))
    return lambda burst: states[burst]


def wandering(num_bursts: int, factor: float, seed: int) -> Callable[[int], float]:
    """A device that slowly becomes so much slower."""
    return lambda burst: float(factor ** (burst / num_bursts))


@pytest.mark.parametrize("drift", [switching, wandering])
@pytest.mark.parametrize("seed", range(3))
def test_true_ratios_are_found_though_the_device_changes_its_speed(drift: Any, seed: int) -> None:
    true = np.geomspace(0.05, 20, 20)
    # 20 operations and 5 of the reference a round
    device = Device([*true, 1.0], drift(30 * 25, 1.5, seed), noise=0.01, seed=seed)
    rows, _ = device.run(Plan(rounds=30, min_rounds=30, **SINGLE))
    assert len(device.bursts) == 30 * 25
    *found, reference = (s.median_ms for s in summarize(rows, 20))
    errors = np.abs(np.array(found) / reference / true - 1)
    assert errors.max() < 0.015

    which = np.concatenate([row["order"] for row in rows])
    ms = np.concatenate([row["ms"] for row in rows])
    raw = np.array([np.median(ms[which == i]) for i in range(20)])
    raw_errors = np.abs(raw / np.median(ms[which == REFERENCE]) / true - 1)
    if drift is switching:  # the median of two speeds is either of them
        assert raw_errors.max() > 0.1 and raw_errors.mean() > 5 * errors.mean()


def test_correction_makes_the_spread_that_of_the_noise() -> None:
    device = Device([1.0] * 10 + [1.0], switching(2000, 2.0, 0), noise=0.01)
    rows, _ = device.run(Plan(rounds=50, min_rounds=50, **SINGLE))
    for found in summarize(rows, 10):
        # quartiles of a normal lie 0.674 deviations off; the neighbours' median adds a little
        assert 0.005 < found.iqr_ms / found.median_ms < 0.03


def test_a_steady_device_is_left_as_it_is() -> None:
    ms = np.tile([1.0, 2.0, 5.0], 10)
    which = np.tile([0, 1, 2], 10)
    np.testing.assert_allclose(corrected(ms, which), ms)
    np.testing.assert_allclose(corrected(np.array([3.0]), np.array([0])), [3.0])


def test_one_interrupted_burst_neither_counts_nor_spoils_its_neighbours() -> None:
    ms = np.tile([1.0, 2.0, 5.0], 10)
    ms[13] = 500.0
    found = corrected(ms, np.tile([0, 1, 2], 10))
    np.testing.assert_allclose(np.delete(found, 13), np.delete(ms, 13))
    assert found[13] == pytest.approx(500.0)


def test_a_burst_is_no_witness_of_its_own_slowness() -> None:
    """Else noise would be taken for drift, and medians for more precise than they are."""
    rng = np.random.default_rng(0)
    ms, which = np.exp(0.01 * rng.standard_normal(6000)), np.arange(6000) % 3
    # independent of its neighbours, whose median of 14 adds a variance of pi / 2 / 14
    spread = np.std(np.log(corrected(ms, which))) / 0.01
    assert spread == pytest.approx((1 + np.pi / 2 / 14) ** 0.5, abs=0.02)


# ---- order


@pytest.mark.parametrize("num_operations", [1, 2, 5, 6, 7, 12, 13, 50])
def test_the_reference_stands_at_both_ends_and_every_few_bursts(num_operations: int) -> None:
    operations = list(range(0, 3 * num_operations, 3))  # those that are not yet precise
    order = round_order(operations, seed=0, index=3)
    assert sorted(which for which in order if which != REFERENCE) == operations
    places = [place for place, which in enumerate(order) if which == REFERENCE]
    assert places[0] == 0 and places[-1] == len(order) - 1
    gaps = np.diff(places) - 1
    assert gaps.min() >= 1 and gaps.max() <= REFERENCE_EVERY


def test_rounds_are_shuffled_and_reproducible() -> None:
    orders = [round_order(range(20), 0, index) for index in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert orders[3] == round_order(range(20), 0, 3)
    assert orders[3] != round_order(range(20), 1, 3)


# ---- statistics


def test_summary_against_sorted_values() -> None:
    times = np.random.default_rng(0).lognormal(size=21)
    ranks = np.sort(times)
    found = statistics(times, np.arange(21.0))
    assert found.median_ms == ranks[10]
    assert found.iqr_ms == pytest.approx(ranks[15] - ranks[5])
    assert found.num_runs == 21
    assert found.energy_mj == 10.0
    assert statistics(times, None).energy_mj is None


@pytest.mark.parametrize("num_runs", [6, 10, 15, 30, 60])
def test_the_confidence_interval_covers_the_median(num_runs: int) -> None:
    """Lognormal times, as measured ones are skewed; their true median is 1."""
    times = np.random.default_rng(num_runs).lognormal(sigma=0.1, size=(4000, num_runs))
    found = [statistics(row, None) for row in times]
    covered = np.mean([abs(s.median_ms - 1) <= s.ci_ms for s in found])
    assert 0.935 < covered < 0.995  # ranks are whole numbers: with few bursts it covers more
    half = np.mean([abs(s.median_ms - 1) <= s.ci_ms / 2 for s in found])
    assert half < 0.91  # the interval is no wider than it must be


def test_few_bursts_tell_nothing_of_their_precision() -> None:
    for num_runs in range(1, MIN_FOR_CI):
        found = statistics(np.linspace(1.0, 1.01, num_runs), None)
        assert found.ci_ms == found.median_ms
    assert statistics(np.linspace(1.0, 1.01, MIN_FOR_CI), None).ci_ms == pytest.approx(0.005)


def test_energy_is_the_mean_over_the_bursts_of_an_operation() -> None:
    rows: list[Row] = [
        {"order": [-1, 0, -1], "ms": [1.0, 2.0, 1.0], "mj": [5.0, 10.0, 7.0], "seconds": 1.0},
        {"order": [-1, 0, -1], "ms": [1.0, 2.0, 1.0], "mj": [6.0, 14.0, 6.0], "seconds": 2.0},
    ]
    assert [s.energy_mj for s in summarize(rows, 1)] == [12.0, 6.0]
    del rows[0]["mj"]  # counted in a part of the rounds only
    assert [s.energy_mj for s in summarize(rows, 1)] == [None, None]


# ---- how long


def scripted_timer(call_ms: float, log: list[int]) -> Timer:
    def timer(num_calls: int) -> float:
        log.append(num_calls)
        return call_ms

    return timer


@pytest.mark.parametrize(
    ("call_ms", "expected"),
    [(1.0, 5), (0.01, 500), (5.0, 1), (80.0, 1), (2.0, 2), (0.0, MAX_CALLS), (-1.0, MAX_CALLS)],
)
def test_a_burst_lasts_about_what_is_asked(call_ms: float, expected: int) -> None:
    calls: list[int] = []
    found = calls_per_burst(scripted_timer(call_ms, calls), Plan(warmup=7, burst_ms=5.0))
    assert found == pytest.approx(expected, abs=1)
    assert calls[0] == 7


def test_one_interrupted_call_does_not_shorten_the_burst() -> None:
    times = iter([9.0, 9.0])
    plan = Plan(warmup=1, burst_ms=5.0)
    assert calls_per_burst(lambda num_calls: next(times, 0.5), plan) == 10


def test_bursts_of_no_length_are_single_calls_and_nothing_else() -> None:
    device = Device([1.0, 2.0, 1.0])
    rows, _ = device.run(Plan(rounds=4, min_rounds=4, **SINGLE))
    assert device.bursts == [which % 3 for row in rows for which in row["order"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"min_rounds": 0}, "min_rounds must be at least 1"),
        ({"warmup": 0}, "warmup must be at least 1"),
        ({"burst_ms": -1.0}, "burst_ms must be at least 0, not -1"),
        ({"burst_ms": float("nan")}, "burst_ms must be at least 0, not nan"),
        ({"precision": 0.0}, "precision must be above 0"),
        ({"precision": float("nan")}, "precision must be above 0"),
        ({"time_limit_s": 0.0}, "time_limit_s must be above 0"),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**change)


def test_it_ends_precise_and_the_precise_ones_are_not_timed_any_more() -> None:
    device = Device([1.0, 2.0, 3.0, 1.0], noise=[0.001, 0.05, 0.001, 0.001])
    rows, ended = device.run(Plan(rounds=2000, min_rounds=10, precision=0.01, **SINGLE))
    assert ended == "precise"
    first, noisy, third, _ = summarize(rows, 3)
    assert first.num_runs == third.num_runs == 10
    # 1.96 * 1.2533 * 0.05 / sqrt(n) = 0.01 at n = 151
    assert noisy.num_runs == len(rows) and 75 < len(rows) < 300
    assert rows[-1]["order"] == [REFERENCE, 1, REFERENCE]
    assert all(s.ci_ms <= 0.01 * s.median_ms for s in (first, noisy, third))


def test_it_ends_by_its_rounds() -> None:
    rows, ended = Device([1.0, 1.0], noise=0.3).run(Plan(rounds=23, precision=1e-3, **SINGLE))
    assert (ended, len(rows)) == ("rounds", 23)


def test_one_round_is_never_precise() -> None:
    plan = Plan(rounds=4, min_rounds=1, precision=0.5, **SINGLE)
    assert Device([1.0, 1.0]).run(plan)[1] == "rounds"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the runner sees; starts anywhere."""
    state = SimpleNamespace(device=None)
    time = SimpleNamespace(perf_counter=lambda: 1e6 + state.device.seconds)
    monkeypatch.setattr(runner, "time", time)
    return state


def test_it_ends_by_its_time_limit(clock: SimpleNamespace) -> None:
    clock.device = Device([1000.0, 2000.0, 500.0], noise=0.1)  # 4 s a round
    rows, ended = clock.device.run(Plan(rounds=500, precision=1e-3, time_limit_s=38, **SINGLE))
    assert (ended, len(rows)) == ("time limit", 10)
    assert rows[-1]["seconds"] == pytest.approx(clock.device.seconds, abs=1e-3)


def test_the_time_limit_holds_over_interruptions(clock: SimpleNamespace, tmp_path: Path) -> None:
    plan = Plan(rounds=500, precision=1e-3, time_limit_s=38, **SINGLE)
    journal = Journal(str(tmp_path / "rounds.jsonl"), {"a": 1})
    clock.device = Device([1000.0, 2000.0, 500.0], noise=0.1)
    clock.device.run(Plan(rounds=4, precision=1e-3, **SINGLE), journal)
    clock.device = Device([1000.0, 2000.0, 500.0], noise=0.1)
    rows, ended = clock.device.run(plan, journal)
    assert (ended, len(rows)) == ("time limit", 10)
    assert clock.device.seconds == pytest.approx(6 * 4, rel=0.1)


def test_at_least_one_round_is_measured(clock: SimpleNamespace) -> None:
    clock.device = Device([1000.0, 500.0])
    rows, ended = clock.device.run(Plan(time_limit_s=1e-9, **SINGLE))
    assert (ended, len(rows)) == ("time limit", 1)


# ---- a clock that cannot be trusted


@pytest.mark.parametrize("bad", [0.0, -3.0, float("inf"), float("nan")])
def test_a_clock_that_stands_or_steps_back_is_asked_again(bad: float) -> None:
    times = iter([bad, bad, 1.5])
    assert burst(lambda num_calls: next(times), 1) == 1.5
    with pytest.raises(ValueError, match="three times in a row"):
        burst(lambda num_calls: bad, 1)


def test_a_round_with_such_a_clock(tmp_path: Path) -> None:
    steps = iter([1.0] * 20 + [-5.0, 0.0])
    journal = Journal(str(tmp_path / "rounds.jsonl"), {})
    plan = Plan(rounds=12, precision=1e-9, **SINGLE)
    rows, _ = run_rounds([lambda _: next(steps, 1.0)], lambda _: 1.0, plan, journal)
    assert {ms for row in rows for ms in row["ms"]} == {1.0}

    journal.delete()
    steps = iter([1.0] * 4)  # then it stands still
    with pytest.raises(ValueError, match="a call took 0.0 ms by the device's clock"):
        run_rounds([lambda _: next(steps, 0.0)], lambda _: 1.0, plan, journal)
    assert len(journal.load(1)) == 4  # what was measured before is kept


# ---- the journal


HEADER = {"target": {"device": "cpu"}, "operations": ["a", "b", "c"]}


class Killed(BaseException):
    pass


class Mortal(Device):
    """Times depend on operation and round alone; dies after so many bursts."""

    def __init__(self, kill_after: int = 10**9, done: int = 0) -> None:
        super().__init__([1.0, 2.0, 3.0, 1.0])
        self.kill_after, self.done = kill_after, done

    def timer(self, which: int) -> Timer:
        def timer(num_calls: int) -> float:
            if len(self.bursts) == self.kill_after:
                raise Killed
            index = self.done + len(self.bursts) // 5  # bursts a round: 3 and the reference twice
            self.bursts.append(which)
            return self.ms[which] * (1 + 0.01 * ((7 * index) % 11))

        return timer


ROUNDS = Plan(rounds=8, min_rounds=8, precision=1e-9, **SINGLE)


def without_seconds(rows: list[Row]) -> list[Row]:
    return [{name: row[name] for name in ("order", "ms")} for row in rows]


@pytest.mark.parametrize("kill_after", [0, 3, 5, 14, 29, 39])
def test_after_a_kill_finished_rounds_are_not_timed_again(
    tmp_path: Path, kill_after: int
) -> None:
    whole, _ = Mortal().run(ROUNDS)
    path = tmp_path / "rounds.jsonl"
    with pytest.raises(Killed):
        Mortal(kill_after).run(ROUNDS, Journal(str(path), HEADER))
    finished = kill_after // 5
    assert len(path.read_text().splitlines()) == 1 + finished
    second = Mortal(done=finished)
    journal = Journal(str(path), HEADER)
    rows, ended = second.run(ROUNDS, journal)
    assert len(second.bursts) == 5 * (8 - finished)
    assert (without_seconds(rows), ended, journal.note) == (without_seconds(whole), "rounds", "")
    again = Mortal(kill_after=0)
    assert again.run(ROUNDS, Journal(str(path), HEADER))[0] == rows
    journal.delete()
    journal.delete()
    assert list(tmp_path.glob("*.jsonl*")) == []


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """A journal of eight rounds."""
    path = tmp_path / "rounds.jsonl"
    Mortal().run(ROUNDS, Journal(str(path), HEADER))
    yield path


def test_a_last_line_that_was_cut_short_is_ignored(written: Path) -> None:
    text = written.read_text()
    start = text.rstrip().rindex("\n") + 1
    for end in range(start, len(text)):
        written.write_text(text[:end])
        journal = Journal(str(written), HEADER)
        assert len(journal.load(3)) == 7 and journal.note == ""
    device = Mortal(done=7)
    device.run(ROUNDS, Journal(str(written), HEADER))  # and nothing is appended to its rest
    assert len(device.bursts) == 5
    assert [len(json.loads(line)) for line in written.read_text().splitlines()] == [2] + [3] * 8


def edited(row: Row, **changes: Any) -> str:
    return json.dumps({**row, **changes})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: "{" + json.dumps(row),
        lambda row: "",
        lambda row: "\ufffd\x00",
        lambda row: "[1]",
        lambda row: json.dumps({"order": row["order"], "ms": row["ms"]}),
        lambda row: edited(row, order=[*row["order"][:-1], 3]),
        lambda row: edited(row, order=[*row["order"][:-1], -2]),
        lambda row: edited(row, order=[*row["order"][:-1], 0.0]),
        lambda row: edited(row, order=[*row["order"][:-1], True]),
        lambda row: edited(row, order=None),
        lambda row: edited(row, ms=None),
        lambda row: edited(row, ms=row["ms"][:-1]),
        lambda row: edited(row, ms=[*row["ms"][:-1], -1.0]),
        lambda row: edited(row, ms=[*row["ms"][:-1], 0.0]),
        lambda row: edited(row, ms=[*row["ms"][:-1], float("nan")]),
        lambda row: edited(row, ms=[*row["ms"][:-1], float("inf")]),
        lambda row: edited(row, ms=[*row["ms"][:-1], "1"]),
        lambda row: edited(row, mj=[1.0]),
        lambda row: edited(row, seconds="1"),
        lambda row: edited(row, seconds=float("nan")),
    ],
)
def test_from_a_corrupt_line_on_rounds_are_measured_anew_with_a_note(
    written: Path, spoil: Callable[[Row], str]
) -> None:
    lines = written.read_text().splitlines()
    lines[4] = spoil(json.loads(lines[4]))
    written.write_text("\n".join(lines) + "\n")
    journal = Journal(str(written), HEADER)
    device = Mortal(done=3)
    rows, _ = device.run(ROUNDS, journal)
    assert len(device.bursts) == 5 * 5
    assert f"{written}, line 5: " in journal.note
    assert without_seconds(rows) == without_seconds(Mortal().run(ROUNDS)[0])


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({**HEADER, "target": {"device": "cuda"}}, "is of another target"),
        ({**HEADER, "operations": ["a", "c", "b"]}, "is of another operations"),
        ({"operations": [], "device": 1}, "is of another device, operations, target"),
    ],
)
def test_rounds_under_another_header_do_not_count(
    written: Path, header: dict[str, Any], words: str
) -> None:
    journal = Journal(str(written), header)
    device = Mortal()
    device.run(ROUNDS, journal)
    assert len(device.bursts) == 40
    assert words in journal.note
    assert json.loads(written.read_text().splitlines()[0]) == header


@pytest.mark.parametrize("content", ["", "{", "nonsense\n", "[]\n", "null\n", "\x00\x01\xff\n"])
def test_a_file_that_is_no_journal(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text(content, encoding="latin-1")
    journal = Journal(str(path), HEADER)
    device = Mortal()
    device.run(ROUNDS, journal)
    assert len(device.bursts) == 40
    assert bool(journal.note) == content.endswith("\n")


def test_more_rounds_than_are_asked_for_are_left_out(written: Path) -> None:
    plan = Plan(rounds=5, precision=1e-9, **SINGLE)
    rows, ended = Mortal(kill_after=0).run(plan, Journal(str(written), HEADER))
    assert (len(rows), ended) == (5, "rounds")


def test_what_was_measured_is_a_valid_row() -> None:
    for row in Mortal().run(ROUNDS)[0]:
        check_row(json.loads(json.dumps(row)), 3)


def test_energy_and_progress() -> None:
    """A counter that grows by 3 mJ a call of the operation, and by 1 a call of the reference."""
    spent, ticks = [100.0], []

    def timer(mj: float) -> Timer:
        def run(num_calls: int) -> float:
            spent[0] += num_calls * mj
            return 0.1

        return run

    rows, _ = run_rounds(
        [timer(3.0)], timer(1.0), Plan(rounds=2, burst_ms=1.0), NOWHERE, lambda: spent[0],
        lambda *values: ticks.append(values),
    )  # fmt: skip
    found = [s.energy_mj for s in summarize(rows, 1)]
    assert found == pytest.approx([3.0, 1.0])
    assert ticks == [(index, done, 3) for index in (0, 1) for done in (1, 2, 3)]


# ---- a program for other devices


def test_syntax_of_python_3_8() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    with pytest.raises(SyntaxError):  # the check can fail
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))
    annotations = {
        id(part)
        for node in ast.walk(tree)
        for root in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if root is not None
        for part in ast.walk(root)
    }
    # Evaluated where the module is loaded or run, `list[int]` and these methods need 3.9.
    generic = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and id(node) not in annotations
        and isinstance(node.value, ast.Name) and node.value.id in {"list", "dict", "tuple", "set"}
    ]  # fmt: skip
    newer = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"removeprefix", "removesuffix"}
        or isinstance(node, ast.keyword) and node.arg == "strict"
    ]  # fmt: skip
    assert not generic and not newer


def test_it_needs_numpy_and_the_standard_library_alone() -> None:
    code = f"""
import runpy, sys
import numpy
before = set(sys.modules)
runpy.run_path({str(SOURCE)!r}, run_name="a_bundle")
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(tops - set(sys.stdlib_module_names) - {{"numpy"}}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
