"""The runner as the program of a bundle, on the device."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latency import runner
from latency.bundle import RUNNER
from latency.runner import Plan

Unpack = Callable[..., Path]
Run = Callable[..., Any]

LONG = Plan(rounds=40, min_rounds=40, warmup=1, burst_ms=5.0)


def rounds(folder: Path) -> list[Any]:
    """What the journal has so far, a half-written line left out."""
    path = folder / "rounds.jsonl"
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def start(folder: Path) -> subprocess.Popen[str]:
    """The runner, with a few rounds done."""
    command = [sys.executable, "-I", str(folder / "runner.py")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while len(rounds(folder)) < 4:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    return process


def test_it_needs_python_3_8_numpy_and_onnxruntime_alone() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 8))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            names.add(node.module.partition(".")[0])
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_what_it_says_and_leaves(unpacked: Unpack, run_device: Run) -> None:
    folder = unpacked(plan=Plan(rounds=3, min_rounds=3, burst_ms=0))
    done = run_device(folder)
    assert done.stdout.splitlines()[:2] == [
        "loading 1 of 5: an empty call",
        "loading 2 of 5: stage1_0=k3, stage1_1=k3",
    ]
    assert "round 1 of at most 3: 1 of 6 bursts" in done.stdout
    assert done.stdout.endswith(f"3 rounds; the result is in {folder / 'result.json'}\n")
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "models", "runner.py", "runner.lock", "result.json",
    }  # fmt: skip
    before = (folder / "result.json").read_bytes()
    assert "is there already" in run_device(folder).stdout
    assert (folder / "result.json").read_bytes() == before


def test_a_kill_loses_nothing(unpacked: Unpack, run_device: Run) -> None:
    folder = unpacked(plan=LONG)
    process = start(folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = rounds(folder)
    assert 4 <= len(kept) < LONG.rounds and not (folder / "result.json").exists()
    with open(folder / "rounds.jsonl", "a") as file:
        file.write('{"order": [0, 1')  # the line it was writing
    done = run_device(folder)
    assert done.returncode == 0, done.stderr
    assert f"round {len(kept) + 1} of at most" in done.stdout
    assert "round 1 of at most" not in done.stdout
    found = result(folder)["rounds"]
    assert found[: len(kept)] == kept and len(found) == LONG.rounds
    assert all(a["seconds"] < b["seconds"] for a, b in zip(found, found[1:], strict=False))


def test_a_second_runner_waits_for_the_first(unpacked: Unpack, run_device: Run) -> None:
    folder = unpacked(plan=LONG)
    first = start(folder)
    second = run_device(folder)
    assert "another runner measures this bundle" in second.stdout
    assert "is there already" in second.stdout and second.returncode == 0
    assert f"{LONG.rounds} rounds; the result is in" in first.communicate()[0]
    assert first.returncode == 0
    assert len(result(folder)["rounds"]) == LONG.rounds


def test_a_damaged_bundle(unpacked: Unpack, run_device: Run, operations: dict[str, Any]) -> None:
    folder = unpacked()
    models = sorted((folder / "models").iterdir())
    models[0].write_bytes(models[0].read_bytes()[:-1])
    models[1].unlink()
    names = {f"models/{path.name}" for path in models[:2]}
    assert set(json.loads(run_device(folder, "--damaged").stdout)) == names
    done = run_device(folder)
    assert done.returncode == 1 and all(name in done.stderr for name in names)
    assert done.stderr.startswith("runner.py: files are missing or damaged")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"threads": 1', '"threads": 2'))
    assert run_device(folder).stderr.startswith("runner.py: manifest.json is damaged")
    manifest.write_text(manifest.read_text()[:-9])
    done = run_device(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_provider_the_device_lacks(unpacked: Unpack, run_device: Run) -> None:
    done = run_device(unpacked(), "--provider", "MyExecutionProvider")
    assert "has no provider 'MyExecutionProvider' here; valid: " in done.stderr
    assert done.stderr.startswith("runner.py: ") and "CPUExecutionProvider" in done.stderr


def test_rounds_of_another_device_are_put_aside(unpacked: Unpack, run_device: Run) -> None:
    folder = unpacked(plan=LONG)
    process = start(folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    path = folder / "rounds.jsonl"
    header, *lines = path.read_text().splitlines()
    changed = json.loads(header)
    changed["device"]["onnxruntime"] = "0.1"
    path.write_text("\n".join([json.dumps(changed), *lines, ""]))
    done = run_device(folder)
    assert "going on from 0 rounds, others cannot be used" in done.stdout
    assert "of another device" in done.stdout
    assert len((folder / "rounds.jsonl.old").read_text().splitlines()) == 1 + len(lines)


def test_a_clock_that_steps_back_once(
    unpacked: Unpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(plan=Plan(rounds=4, min_rounds=4, burst_ms=0))
    true, looks = time.perf_counter, iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: true() - 100 * (next(looks) > 40))
    runner.measure_bundle(str(folder), None, False)
    found = result(folder)["rounds"]
    assert next(looks) > 60 and len(found) == 4
    assert all(0 < ms < 1000 for row in found for ms in row["ms"])


def test_a_clock_that_runs_backwards(
    unpacked: Unpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, and what was measured before remains."""
    folder = unpacked(plan=Plan(rounds=4, min_rounds=4, burst_ms=0))
    true = time.perf_counter

    def clock() -> float:
        return -true() if len(rounds(folder)) >= 2 else true()

    monkeypatch.setattr(time, "perf_counter", clock)
    with pytest.raises(ValueError, match="a call took -.* three times in a row"):
        runner.measure_bundle(str(folder), None, False)
    kept = rounds(folder)
    assert len(kept) == 2
    monkeypatch.setattr(time, "perf_counter", true)
    runner.measure_bundle(str(folder), None, False)
    assert result(folder)["rounds"][:2] == kept and len(result(folder)["rounds"]) == 4


def test_what_the_device_is(run_device: Run, unpacked: Unpack) -> None:
    done = run_device(unpacked(), "--provider", "CPUExecutionProvider", "--describe", '{"a": 1}')
    found = json.loads(done.stdout)
    assert found["provider"] == "CPUExecutionProvider a=1"
    assert f"{os.cpu_count()} cores" in found["device_name"]


def test_energy_is_measured_where_the_device_tells_it(
    unpacked: Unpack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "energy_uj").write_text("1000\n")
    (zone / "max_energy_range_uj").write_text("100000\n")
    monkeypatch.setattr(runner, "RAPL", str(tmp_path / "powercap"))
    real = runner.session_timer

    def spending(*args: Any) -> runner.Timer:
        timer = real(*args)

        def spend(num_calls: int) -> float:
            spent = int((zone / "energy_uj").read_text())
            (zone / "energy_uj").write_text(str((spent + 2000 * num_calls) % 100001))
            return timer(num_calls)

        return spend

    monkeypatch.setattr(runner, "session_timer", spending)
    folder = unpacked(plan=Plan(rounds=2, min_rounds=2, burst_ms=0))
    runner.measure_bundle(str(folder), None, False)
    for row in result(folder)["rounds"]:
        assert row["mj"] == pytest.approx([2.0] * len(row["order"]))
