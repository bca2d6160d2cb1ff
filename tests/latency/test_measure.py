from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from latency.cache import cache_folder, machine_lock
from latency.measure import (
    Work,
    cache_path,
    cached_table,
    keep,
    measure,
    measure_networks,
    work_of,
)
from latency.runner import Plan
from latency.sites import Site
from latency.table import Calibration, LatencyTable, OpKey, Target

MakeSites = Callable[[str], list[Site]]
EMPTY_MS = 0.125  # the script's


def times(table: LatencyTable) -> dict[str, float]:
    return {key.op: m.median_ms for key, m in table.measurements.items()}


# ---- operations


def test_provenance(scripted: Any, make_sites: MakeSites, target: Target, plan: Plan) -> None:
    table = measure(make_sites("a"), scripted(), target, replace(plan, seed=4))
    assert table.target == target
    assert table.provenance["device_name"] == "script"
    assert {"torch", "timm", "date"} <= table.provenance.keys()
    settings = {"rounds": 3, "min_rounds": 3, "burst_ms": 0.0, "seed": 4, "ended": "rounds"}
    assert {name: table.provenance[name] for name in settings} == settings
    assert (table.overhead_ms, table.reference_ms) == (EMPTY_MS, 2.0)
    json.dumps(table.provenance)


def test_an_empty_call_is_taken_out_and_nothing_is_below_zero(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan
) -> None:
    clock = {"a": 1.0, "b": 0.5, "c": EMPTY_MS, "d": 0.01}
    table = measure(make_sites("abcd"), scripted(lambda name, _: clock[name]), target, plan)
    assert times(table) == {"a": 0.875, "b": 0.375, "c": 0.0, "d": 0.0}


def test_a_frame_is_taken_out_of_what_stood_in_it(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan
) -> None:
    """One with vectors stands alone, and an empty call is taken out of it."""

    class Framing(scripted):  # type: ignore[misc]
        framed = True

    clock = {"framed a": 5.0, "framed b": 2.5, "framed c": 1.5, "a frame": 2.0, "d": 1.0}
    a, b, c, d = make_sites("abcd")
    d = replace(d, output_shape=(1, 3))
    backend = Framing(lambda name, _: clock[name])
    table = measure([a, b, c, d], backend, target, plan)
    assert times(table) == {"a": 3.0, "b": 0.5, "c": 0.0, "d": 1.0 - EMPTY_MS}
    assert sorted(set(backend.bursts)) == sorted(clock)
    assert backend.bursts.count("a frame") == 3  # once a round for all who share it


def test_the_confidence_of_a_difference_and_the_precision_of_what_was_timed(
    scripted: Any, make_sites: MakeSites, target: Target
) -> None:
    class Framing(scripted):  # type: ignore[misc]
        framed = True

    # The extremes of six rounds are the interval; all else is steady, so nothing is corrected.
    clock = {"framed a": [8.0, 8.3, 8.0, 7.7, 8.0, 8.0], "a frame": [6.0, 6.4, 6.0, 5.6, 6.0, 6.0]}
    backend = Framing(lambda name, burst: clock[name][burst], base=(0.125, 2.0))
    table = measure(make_sites("a"), backend, target, Plan(rounds=6, min_rounds=6, burst_ms=0.0))
    (found,) = table.measurements.values()
    assert found.median_ms == pytest.approx(2.0)
    assert found.ci_ms == pytest.approx(0.5)  # of 0.3 and 0.4
    assert found.precision == pytest.approx(0.3 / 8.0)


def test_operations_are_measured_once_and_named_by_all_that_need_them(
    scripted: Any, make_sites: MakeSites, target: Target
) -> None:
    a, b = make_sites("ab")
    sites = [
        replace(a, choice="x", option="k3"), b, replace(a, choice="y", option="k3"), a,
        replace(a, choice="x", option="k3"),
    ]  # fmt: skip
    work = work_of(sites, scripted(), target)
    assert isinstance(work, Work)
    assert {name: operation.where for name, operation in work.operations.items()} == {
        str(a.key): "x=k3, y=k3, a fixed layer",
        str(b.key): "a fixed layer",
    }
    assert work.names[b.key] == (str(b.key), "an empty call")


def test_progress_prints_nothing_where_there_is_no_terminal(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, "latency"):
        measure(make_sites("abc"), scripted(), target, plan)
    assert capfd.readouterr().err == ""
    first, second = (r.getMessage() for r in caplog.records)
    assert first == "measuring 3 operations on cpu"
    assert second.startswith("measuring ended by its rounds: 3 of 3 operations have a 95%")


def test_a_table_that_is_precise_says_nothing(
    scripted: Any, make_sites: MakeSites, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "latency"):
        table = measure(make_sites("ab"), scripted(), target, Plan(burst_ms=0.0))
    assert table.provenance["ended"] == "precise"
    assert {m.num_runs for m in table.measurements.values()} == {10}
    assert "ended by" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int3"}, "dtype='int3'; valid: float32"),
        ({"device": "tpu"}, "device='tpu' here; valid: cpu"),
        ({"runtime": "other"}, "runtime='other'; valid: torch"),
        ({"batch": 4}, "traced with a batch of 1, but the target's batch is 4"),
    ],
)
def test_a_target_that_cannot_be_measured(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, change: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    for function in (measure, cached_table):
        with pytest.raises(ValueError, match=message):
            function(make_sites("a"), scripted(), replace(target, **change), plan)


def test_an_operation_that_fails_is_named_with_its_choice(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan
) -> None:
    def clock(name: str, burst: int) -> float:
        if name == "b" and burst == 1:
            raise RuntimeError("the kernel crashed")
        return 1.0

    a, b = make_sites("ab")
    b = replace(b, choice="stage1_0", option="k5")
    with pytest.raises(ValueError, match=r"stage1_0=k5 cannot be measured \(b in_chs.*crashed"):
        measure([a, b], scripted(clock), target, plan)


def clock(name: str, burst: int) -> float:
    """Deterministic, different for every operation and round."""
    return (ord(name) - 96) * (1 + 0.01 * ((7 * burst) % 11))


@pytest.mark.parametrize("kill_after", [0, 2, 4, 9, 19])
def test_after_a_kill_finished_rounds_are_kept_and_the_table_is_the_same(
    scripted: Any, make_sites: MakeSites, target: Target, killed: Any, tmp_path: Path,
    kill_after: int, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    plan, sites = Plan(rounds=5, min_rounds=5, burst_ms=0.0), make_sites("abcd")
    whole = measure(sites, scripted(clock), target, plan)
    journal = tmp_path / "rounds.jsonl"
    with pytest.raises(killed):
        measure(sites, scripted(clock, kill_after), target, plan, journal)
    finished = kill_after // 4
    second = scripted(lambda name, burst: clock(name, burst + finished))
    with caplog.at_level(logging.INFO, "latency"):
        resumed = measure(sites, second, target, plan, journal)
    assert len(second.bursts) == 4 * (5 - finished)
    assert resumed.measurements == whole.measurements
    assert (f"{finished} rounds done before" in caplog.text) == (finished > 0)
    assert list(tmp_path.glob("*.jsonl*")) == []


def test_rounds_that_cannot_be_used_are_told(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, killed: Any,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    journal = tmp_path / "rounds.jsonl"
    with pytest.raises(killed):
        measure(make_sites("abc"), scripted(kill_after=7), target, plan, journal)
    backend = scripted()
    measure(make_sites("abd"), backend, target, plan, journal)
    assert len(backend.bursts) == 9
    assert f"going on from 0 rounds, others cannot be used: {journal} is of another oper" in (
        caplog.text
    )


# ---- whole networks


def test_networks_are_interleaved(scripted: Any, named: Any, target: Target) -> None:
    backend = scripted(lambda name, burst: (4.0 if name == "b" else 1.0) * (1 + 0.1 * (burst % 2)))
    plan = Plan(rounds=4, min_rounds=4, burst_ms=0.0)
    a, b = measure_networks([named("a"), named("b")], backend, target, plan, in_chans=3)
    assert (a.measurement.median_ms, b.measurement.median_ms) == pytest.approx((1.05, 4.2))
    assert a.halves == pytest.approx((1.0, 1.1)) and b.halves == pytest.approx((4.0, 4.4))
    assert (a.speed, a.measurement.num_runs) == (1.0, 4)
    assert all(sorted(backend.bursts[i : i + 2]) == ["a", "b"] for i in (0, 2, 4, 6))


def test_networks_are_brought_to_the_speed_of_their_table(
    scripted: Any, named: Any, target: Target, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference took 2 ms now, and 2.1 or 3 ms when the table was measured."""

    def ask(reference_ms: float) -> Any:
        (found,) = measure_networks(
            [named("a")], scripted(lambda *_: 10.0), target, plan, in_chans=3,
            reference_ms=reference_ms,
        )  # fmt: skip
        return found

    found = ask(2.1)
    assert found.measurement.median_ms == pytest.approx(10.5)
    assert found.halves == pytest.approx((10.5, 10.5))
    assert found.speed == pytest.approx(1.05)
    assert not caplog.records
    assert ask(3.0).measurement.median_ms == pytest.approx(15.0)
    assert "the device is 1.50 times as fast as when the first latencies were" in caplog.text


def test_the_copies_of_a_network_are_averaged(
    scripted: Any, named: Any, target: Target, plan: Plan
) -> None:
    """Each copy takes its own time; the anchors say that the device is half as fast as it was."""
    takes = {"a": iter([2.0, 3.0, 7.0]), "b": iter([5.0, 5.0, 5.0]), "c": iter([4.0])}

    class Backend(scripted):  # type: ignore[misc]
        def prepare(self, operation: Any, target: Target) -> Any:
            if not hasattr(operation.module, "name"):
                return super().prepare(operation, target)
            ms = next(takes[operation.module.name])
            return lambda num_calls: ms

    a, b = measure_networks(
        [named("a"), named("b")], Backend(), target, plan, in_chans=3,
        anchors=[(named("c"), 2.0)], copies=3,
    )  # fmt: skip
    assert (a.speed, b.speed) == (0.5, 0.5)
    assert (a.measurement.median_ms, b.measurement.median_ms) == pytest.approx((2.0, 2.5))
    assert a.measurement.num_runs == 3 * plan.rounds
    assert a.halves == pytest.approx((2.0, 2.0))


def test_networks_in_one_round(scripted: Any, named: Any, target: Target) -> None:
    plan = Plan(rounds=1, burst_ms=0.0)
    (found,) = measure_networks([named("a")], scripted(), target, plan, in_chans=3)
    assert found.halves == (1.0, 1.0)


# ---- the cache


def test_cache_serves_several_spaces_and_measures_only_what_is_new(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path
) -> None:
    def ask(letters: str, **changes: Any) -> tuple[LatencyTable, Path, bool, list[str]]:
        backend = scripted(lambda name, _: float(ord(name)))
        asked = replace(plan, **changes)
        found = cached_table(make_sites(letters), backend, target, asked, tmp_path / "cache")
        return *found, backend.bursts

    first, path, fresh, bursts = ask("abc")
    assert fresh and sorted(set(bursts)) == list("abc")
    again, same, fresh, bursts = ask("abc")
    assert (again, same, fresh, bursts) == (first, path, False, [])

    other, same, fresh, bursts = ask("cd")
    assert same == path and fresh and set(bursts) == {"d"}
    assert [key.op for key in other.measurements] == ["c", "d"]
    assert [key.op for key in LatencyTable.load(path).measurements] == list("abcd")
    assert ask("abcd")[3] == []

    careful, _, _, bursts = ask("ab", rounds=8, min_rounds=8)
    assert set(bursts) == {"a", "b"}
    assert {m.num_runs for m in careful.measurements.values()} == {8}
    assert ask("ab")[3] == []
    assert ask("ab", rounds=9)[3] == []  # they are precise
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_one_round_is_not_taken_for_precise(
    scripted: Any, make_sites: MakeSites, target: Target, tmp_path: Path
) -> None:
    """A table that was measured in haste does not stand for a careful one."""
    sites, folder = make_sites("a"), tmp_path / "cache"
    cached_table(sites, scripted(), target, Plan(rounds=1, burst_ms=0.0), folder)
    table, _, fresh = cached_table(sites, scripted(), target, Plan(burst_ms=0.0), folder)
    assert fresh and {m.num_runs for m in table.measurements.values()} == {10}


def test_new_measurements_are_brought_to_the_speed_of_the_cache(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    cached_table(make_sites("a"), scripted(), target, plan, folder)
    slow = scripted(lambda *_: 2.0, base=(0.25, 4.0))  # the same device in a slow hour
    table, path, _ = cached_table(make_sites("ab"), slow, target, plan, folder)
    assert times(table) == {"a": 0.875, "b": 0.875}
    assert LatencyTable.load(path).reference_ms == 2.0


def test_calibrations_are_kept_with_the_measurements(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path
) -> None:
    table, path, _ = cached_table(make_sites("ab"), scripted(), target, plan, tmp_path / "cache")
    calibration = Calibration("space", "{}", 1.0, 2.0, 3.0, 8, {})
    table.calibrate(calibration)
    keep(path, table)
    again, _, fresh = cached_table(make_sites("a"), scripted(), target, plan, tmp_path / "cache")
    assert not fresh and again.calibration("space", "{}") == calibration
    keep(tmp_path / "new.json", table)
    assert LatencyTable.load(tmp_path / "new.json") == table


def test_cache_is_bound_to_target_and_versions(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path
) -> None:
    class Newer(scripted):  # type: ignore[misc]
        def describe(self) -> dict[str, str]:
            return {"device_name": "script", "torch": "1"}

    folder = tmp_path / "cache"
    _, path, _ = cached_table(make_sites("a"), scripted(), target, plan, folder)
    assert path.name.startswith("cpu-torch-float32-b1-r8-")
    for backend, other in [(scripted(), replace(target, threads=2)), (Newer(), target)]:
        assert cache_path(backend, other, folder) != path
        _, another, fresh = cached_table(make_sites("a"), backend, other, plan, folder)
        assert fresh and another != path


@pytest.mark.parametrize("version", [1, 2])
def test_a_spoilt_or_old_cache_is_measured_anew(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, version: int,
) -> None:  # fmt: skip
    folder = tmp_path / "cache"
    first, path, _ = cached_table(make_sites("ab"), scripted(), target, plan, folder)
    text = path.read_text()
    path.write_text(text[:-20] if version == 2 else text.replace('"version": 2', '"version": 1'))
    assert path.read_text() != text
    table, _, fresh = cached_table(make_sites("ab"), scripted(), target, plan, folder)
    assert fresh and table.measurements == first.measurements
    assert "measured anew" in caplog.text and str(path) in caplog.text


def test_cached_measuring_goes_on_after_a_kill(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path, killed: Any
) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(killed):
        cached_table(make_sites("ab"), scripted(kill_after=5), target, plan, folder)
    backend = scripted()
    cached_table(make_sites("c"), scripted(), target, plan, folder)  # another space in between
    cached_table(make_sites("ab"), backend, target, plan, folder)
    assert len(backend.bursts) == 2  # two of three rounds were finished


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SUPERNET_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home/.cache/supernet"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/supernet"
    monkeypatch.setenv("SUPERNET_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_two_jobs_measure_one_after_the_other(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The second waits for the lock, then finds the table of the first."""
    backends = [scripted(), scripted()]
    results: list[bool] = []

    def job(backend: Any) -> None:
        found = cached_table(make_sites("ab"), backend, target, plan, tmp_path / "cache")
        results.append(found[2])

    threads = [threading.Thread(target=job, args=(backend,)) for backend in backends]
    with caplog.at_level(logging.INFO), machine_lock():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.2)
        assert not any(backend.bursts for backend in backends)
        assert "waiting for another job" in caplog.text
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [False, True]
    assert sorted(len(backend.bursts) for backend in backends) == [0, 6]


def test_the_lock_is_given_back_after_an_error(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan, killed: Any
) -> None:
    with pytest.raises(killed):
        measure(make_sites("a"), scripted(kill_after=0), target, plan)
    (path,) = cache_folder().glob("*.lock")
    with FileLock(path, timeout=0):
        pass


def test_keys_with_equal_text_are_one_operation(
    scripted: Any, make_sites: MakeSites, target: Target, plan: Plan
) -> None:
    backend = scripted()
    table = measure(make_sites("abab"), backend, target, plan)
    assert list(table.measurements) == [OpKey("a", 3, 3, 1, 8), OpKey("b", 3, 3, 1, 8)]
    assert len(backend.bursts) == 6
