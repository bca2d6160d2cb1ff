from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latency.measure import measure
from latency.sampling import MAX_CALLS, Plan, calls_per_burst, round_order, summarize
from latency.table import Target


def scripted_timer(call_ms: float, log: list[int]) -> Any:
    def timer(num_calls: int) -> float:
        log.append(num_calls)
        return call_ms

    return timer


@pytest.mark.parametrize(
    ("call_ms", "expected"),
    [(1.0, 5), (0.01, 500), (5.0, 1), (80.0, 1), (2.0, 2), (0.0, MAX_CALLS)],
)
def test_a_burst_lasts_about_what_is_asked(call_ms: float, expected: int) -> None:
    calls: list[int] = []
    found = calls_per_burst(scripted_timer(call_ms, calls), Plan(1, 7, 5.0, 0))
    assert found == pytest.approx(expected, abs=1)
    assert calls[0] == 7


def test_one_interrupted_call_does_not_shorten_the_burst() -> None:
    times = iter([9.0, 9.0])

    def timer(num_calls: int) -> float:
        return next(times, 0.5)

    assert calls_per_burst(timer, Plan(1, 1, 5.0, 0)) == 10


def test_rounds_are_shuffled_and_reproducible() -> None:
    orders = [round_order(20, 0, index) for index in range(5)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders[3] == round_order(20, 0, 3)
    assert orders[3] != round_order(20, 1, 3)


def test_summary_against_sorted_values() -> None:
    times = np.random.default_rng(0).lognormal(size=21)
    ranks = np.sort(times)
    found = summarize(times)
    assert found.median_ms == ranks[10]
    assert found.iqr_ms == pytest.approx(ranks[15] - ranks[5])
    assert found.num_runs == 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": 0}, "warmup=0"),
        ({"burst_ms": 0.0}, "burst_ms=0"),
        ({"burst_ms": float("nan")}, "burst_ms=nan"),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"rounds": 1, "warmup": 1, "burst_ms": 1.0, "seed": 0, **change})


def clock(name: str, burst: int) -> float:
    """Deterministic, different for every operation and round."""
    return (ord(name) - 96) * (1 + 0.01 * ((7 * burst) % 11))


def test_every_operation_runs_once_a_round_and_medians_are_right(
    scripted: Any, make_sites: Any, target: Any, tmp_path: Path
) -> None:
    backend = scripted(clock)
    path = tmp_path / "progress.json"
    table = measure(
        make_sites("abcdab"), backend, target, rounds=7, warmup=3, burst_ms=1.0, progress_path=path
    )
    rounds = [backend.bursts[i : i + 4] for i in range(0, 28, 4)]
    assert len(backend.bursts) == 28
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert [w for w in backend.warmups if w[1] == 3] == [(x, 3) for x in "abcd"]
    for key, found in table.measurements.items():
        samples = [clock(key.op, burst) for burst in range(7)]
        low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
        assert found.median_ms == pytest.approx(median)
        assert found.iqr_ms == pytest.approx(high - low)
        assert found.num_runs == 7
    assert list(tmp_path.glob("**/*progress*")) == []


@pytest.mark.parametrize("kill_after", [0, 2, 4, 9, 19])
def test_after_a_kill_finished_rounds_are_kept_and_the_table_is_the_same(
    scripted: Any, make_sites: Any, target: Any, killed: Any, tmp_path: Path, kill_after: int
) -> None:
    plan = {"rounds": 5, "warmup": 3, "burst_ms": 1.0, "progress_path": tmp_path / "progress.json"}
    sites = make_sites("abcd")
    whole = measure(sites, scripted(clock), target, **plan)

    with pytest.raises(killed):
        measure(sites, scripted(clock, kill_after), target, **plan)
    finished = kill_after // 4
    left = [p.name for p in tmp_path.iterdir() if p.name != "supernet_cache"]
    assert left == (["progress.json"] if finished else [])  # whole or absent, nothing beside it
    if finished:
        assert len(json.loads((tmp_path / "progress.json").read_text())["rounds"]) == finished

    second = scripted(lambda name, burst: clock(name, burst + finished))
    resumed = measure(sites, second, target, **plan)
    assert len(second.bursts) == 4 * (5 - finished)
    assert resumed.measurements == whole.measurements
    assert not (tmp_path / "progress.json").exists()


def interrupt(scripted: Any, sites: Any, target: Any, killed: Any, path: Path) -> None:
    with pytest.raises(killed):
        measure(
            sites, scripted(clock, 5), target, rounds=5, warmup=3, burst_ms=1.0, progress_path=path
        )


@pytest.mark.parametrize("spoil", ["target", "keys", "version", "truncated", "nan", "row", "list"])
def test_progress_of_something_else_is_discarded_with_a_warning(
    scripted: Any, make_sites: Any, target: Any, killed: Any, tmp_path: Path, spoil: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path, sites = tmp_path / "progress.json", make_sites("abcd")
    if spoil == "keys":
        interrupt(scripted, make_sites("abce"), target, killed, path)
    elif spoil == "target":
        interrupt(scripted, sites, Target(resolution=8, threads=2), killed, path)
    else:
        interrupt(scripted, sites, target, killed, path)
    value = json.loads(path.read_text())
    if spoil == "version":
        value["version"] = 9
    elif spoil == "nan":
        value["rounds"][0][1] = float("nan")
    elif spoil == "row":
        value["rounds"][0].pop()
    elif spoil == "list":
        value = [1]
    text = json.dumps(value)
    path.write_text(text[:-9] if spoil == "truncated" else text)
    backend = scripted(clock)
    with caplog.at_level(logging.WARNING):
        measure(sites, backend, target, rounds=5, warmup=3, burst_ms=1.0, progress_path=path)
    assert len(backend.bursts) == 20
    assert "measuring starts anew" in caplog.text and str(path) in caplog.text
