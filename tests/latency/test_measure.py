from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from latency.cache import cache_folder, machine_lock
from latency.measure import cached_table, measure, measure_network, measure_networks
from latency.sites import Site
from latency.table import LatencyTable, Target

QUICK: dict[str, Any] = {"rounds": 3, "warmup": 1, "burst_ms": 1.0}
MakeSites = Callable[[str], list[Site]]


def test_provenance(scripted: Any, make_sites: MakeSites, target: Target) -> None:
    table = measure(make_sites("a"), scripted(), target, seed=4, **QUICK)
    assert table.target == target
    assert table.provenance["device_name"] == "script"
    assert {"torch", "timm", "date"} <= table.provenance.keys()
    assert {k: table.provenance[k] for k in QUICK} == QUICK
    assert table.provenance["seed"] == 4


def test_one_millisecond_reads_one(scripted: Any, make_sites: MakeSites, target: Target) -> None:
    table = measure(make_sites("a"), scripted(lambda *_: 1.0), target, **QUICK)
    assert [m.median_ms for m in table.measurements.values()] == [1.0]


def test_progress_prints_nothing_where_there_is_no_terminal(
    scripted: Any, make_sites: MakeSites, target: Target, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, "latency"):
        measure(make_sites("abc"), scripted(), target, **QUICK)
    assert capfd.readouterr().err == ""
    assert [r.getMessage() for r in caplog.records] == ["measuring 3 operations on cpu in 3 rounds"]


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
    scripted: Any, make_sites: MakeSites, target: Target, change: dict[str, Any], message: str
) -> None:
    for function in (measure, cached_table):
        with pytest.raises(ValueError, match=message):
            function(make_sites("a"), scripted(), replace(target, **change), **QUICK)


def test_networks_are_interleaved(scripted: Any, operation: Any, target: Target) -> None:
    def clock(name: str, burst: int) -> float:
        return (2.0 if name == "b" else 1.0) + burst

    backend = scripted(clock)
    networks = [operation("a"), operation("b")]
    found = measure_networks(networks, backend, target, in_chans=3, **QUICK)
    assert [(m.median_ms, m.iqr_ms, m.num_runs) for m in found] == [(2.0, 1.0, 3), (3.0, 1.0, 3)]
    assert all(sorted(backend.bursts[i : i + 2]) == ["a", "b"] for i in (0, 2, 4))
    assert measure_network(operation("a"), scripted(), target, in_chans=3).median_ms == 1.0


def test_cache_serves_several_spaces_and_measures_only_what_is_new(
    scripted: Any, make_sites: MakeSites, target: Target, tmp_path: Path
) -> None:
    def ask(letters: str, **changes: Any) -> tuple[LatencyTable, Path, bool, list[str]]:
        backend = scripted(lambda name, _: float(ord(name)))
        settings = {**QUICK, "cache_dir": tmp_path / "cache", **changes}
        return *cached_table(make_sites(letters), backend, target, **settings), backend.bursts

    first, path, fresh, bursts = ask("abc")
    assert fresh and sorted(set(bursts)) == list("abc")
    again, same, fresh, bursts = ask("abc")
    assert (again, same, fresh, bursts) == (first, path, False, [])

    other, same, fresh, bursts = ask("cd")
    assert same == path and fresh and set(bursts) == {"d"}
    assert [key.op for key in other.measurements] == ["c", "d"]
    assert [key.op for key in LatencyTable.load(path).measurements] == list("abcd")
    assert ask("abcd")[3] == []

    careful, _, _, bursts = ask("ab", rounds=5)
    assert set(bursts) == {"a", "b"}
    assert {m.num_runs for m in careful.measurements.values()} == {5}
    assert ask("ab")[3] == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_cache_is_bound_to_target_and_versions(
    scripted: Any, make_sites: MakeSites, target: Target, tmp_path: Path
) -> None:
    class Newer(scripted):  # type: ignore[misc]
        def describe(self) -> dict[str, str]:
            return {"device_name": "script", "torch": "1"}

    settings = {**QUICK, "cache_dir": tmp_path / "cache"}
    _, path, _ = cached_table(make_sites("a"), scripted(), target, **settings)
    for backend, other in [(scripted(), replace(target, threads=2)), (Newer(), target)]:
        _, another, fresh = cached_table(make_sites("a"), backend, other, **settings)
        assert fresh and another != path


def test_a_spoilt_cache_is_measured_anew(
    scripted: Any, make_sites: MakeSites, target: Target, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = {**QUICK, "cache_dir": tmp_path / "cache"}
    first, path, _ = cached_table(make_sites("ab"), scripted(), target, **settings)
    path.write_text(path.read_text()[:-20])
    table, _, fresh = cached_table(make_sites("ab"), scripted(), target, **settings)
    assert fresh and table.measurements == first.measurements
    assert "measured anew" in caplog.text and str(path) in caplog.text


def test_cached_measuring_goes_on_after_a_kill(
    scripted: Any, make_sites: MakeSites, target: Target, tmp_path: Path, killed: Any
) -> None:
    settings = {**QUICK, "cache_dir": tmp_path / "cache"}
    with pytest.raises(killed):
        cached_table(make_sites("ab"), scripted(kill_after=5), target, **settings)
    backend = scripted()
    cached_table(make_sites("c"), scripted(), target, **settings)  # another space in between
    cached_table(make_sites("ab"), backend, target, **settings)
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
    scripted: Any, make_sites: MakeSites, target: Target, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The second waits for the lock, then finds the table of the first."""
    backends = [scripted(), scripted()]
    results: list[bool] = []

    def job(backend: Any) -> None:
        settings = {**QUICK, "cache_dir": tmp_path / "cache"}
        results.append(cached_table(make_sites("ab"), backend, target, **settings)[2])

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
    scripted: Any, make_sites: MakeSites, target: Target, killed: Any
) -> None:
    with pytest.raises(killed):
        measure(make_sites("a"), scripted(kill_after=0), target, **QUICK)
    (path,) = cache_folder().glob("*.lock")
    with FileLock(path, timeout=0):
        pass
