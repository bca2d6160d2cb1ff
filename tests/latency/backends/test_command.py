from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latency.backends.command import Command, run
from latency.runner import Plan
from latency.samples import EMPTY, Operation, Unmeasurable
from latency.table import Target

# Prints the ONNX file's size / 1000 as the time, and keeps a list of its calls.
BENCH = """
import os, sys
path = sys.argv[1]
open(sys.argv[2], "a").write(path + "\\n")
print("loading", path, "on 4 threads")
print("latency:", os.path.getsize(path) / 1000, "ms")
"""


@pytest.fixture
def bench(tmp_path: Path) -> str:
    script = tmp_path / "my bench.py"
    script.write_text(BENCH)
    return f"{sys.executable} -S '{script}' {{onnx}} {tmp_path / 'calls'}"


def test_the_command_tells_the_times(
    bench: str, operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    """One call a burst: four rounds of four operations and two references."""
    backend = Command(bench)
    backend.check(target)
    found = backend.sample(operations, target, plan)
    assert list(found.names) == [EMPTY, *operations]
    assert found.ended == "rounds" and found.plan["burst_ms"] == 0
    assert found.measurement("conv").median_ms > 4 * 27 * 40 / 1000  # its weights are in the file
    assert found.measurement("conv").median_ms > found.measurement("relu").median_ms > 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 * (len(operations) + 1 + 2)
    assert len(set(calls)) == len(operations) + 2
    assert not any(Path(path).exists() for path in calls)


def test_int8(bench: str, operations: dict[str, Operation], target: Target, plan: Plan) -> None:
    whole = Command(bench).sample(operations, target, plan).measurement("conv").median_ms
    int8 = Target(device="npu", runtime="mine", dtype="int8", resolution=8)
    Command(bench).check(int8)
    quantised = Command(bench).sample(operations, int8, plan).measurement("conv").median_ms
    assert quantised != whole


def test_targets(bench: str) -> None:
    backend = Command(bench)
    assert (backend.device, backend.runtime) == ("device", "command")
    assert Command(bench, device="phone", runtime="tflite").runtime == "tflite"
    assert bench.split()[0] in backend.describe()["device_name"]
    with pytest.raises(ValueError, match="'float16'; valid: float32, int8"):
        backend.check(Target(runtime="tflite", dtype="float16"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(3); raise SystemExit(2)", "ended with 2; it printed: 3"),
        ("print('a\\nb\\nc\\nd'); 1/0", r"ended with 1; .*\| ZeroDivisionError: division by zero"),
        ("print('no time')", "printed no number; it printed: no time"),
        ("print('12 ms'); print(-1.5)", "printed -1.5, not a time"),
        ("print('0 ms')", "printed 0, not a time"),
        ("print('1e999')", "printed 1e999, not a time"),
        ("pass", "printed no number($|; to search)"),
        ("import time; time.sleep(30)", "took longer than backend.timeout_s=1"),
    ],
)
def test_errors_name_the_operation(
    code: str, message: str, operations: dict[str, Operation], target: Target, plan: Plan
) -> None:
    backend = Command(f'{sys.executable} -S -c "{code}" {{onnx}}', timeout_s=1.0)
    with pytest.raises(Unmeasurable, match=message) as found:
        backend.sample(operations, target, plan)
    assert any(operation.where in str(found.value) for operation in operations.values()) or (
        EMPTY in str(found.value) or "the reference" in str(found.value)
    )


@pytest.mark.parametrize(
    ("text", "ms"),
    [("12 runs: 1.5 ms", 1.5), ("1e-2", 0.01), ("+.5", 0.5), ("a1\nb 2.\n", 2.0)],
)
def test_the_last_number_counts(text: str, ms: float) -> None:
    assert run([sys.executable, "-S", "-c", f"print({text!r})"], 10.0) == ms


def test_a_command_without_a_file_or_a_program(
    operations: dict[str, Operation], target: Target, plan: Plan
) -> None:
    with pytest.raises(ValueError, match=r"has no \{onnx\}"):
        Command("bench --model model.onnx")
    with pytest.raises(Unmeasurable, match="cannot be run: No such file"):
        Command("no-such-program {onnx}").sample(operations, target, plan)


def test_an_operation_that_cannot_be_exported(
    bench: str, unexportable: Operation, target: Target, plan: Plan
) -> None:
    with pytest.raises(Unmeasurable, match=r"stage2_1=k5 cannot be measured \(odd\)"):
        Command(bench).sample({"odd": unexportable}, target, plan)


def test_an_interrupted_measurement_goes_on(
    bench: str, operations: dict[str, Operation], target: Target, tmp_path: Path
) -> None:
    """The file that a second command finds missing is the interruption."""
    plan = Plan(rounds=3, min_rounds=3, burst_ms=0)
    journal, calls = tmp_path / "journal", tmp_path / "calls"
    limit = f"import os; n = len(open('{calls}').readlines()) if os.path.exists('{calls}') else 0"
    script = tmp_path / "my bench.py"
    script.write_text(f"{limit}\nassert n != 15 or os.path.exists('{tmp_path / 'on'}')\n{BENCH}")
    with pytest.raises(Unmeasurable, match="AssertionError"):
        Command(bench).sample(operations, target, plan, journal)
    assert len(journal.read_text().splitlines()) == 1 + 2  # two rounds of six are kept
    (tmp_path / "on").touch()
    found = Command(bench).sample(operations, target, plan, journal)
    assert len(found.rows) == 3 and len(calls.read_text().splitlines()) == 15 + 6
    assert not journal.exists()
