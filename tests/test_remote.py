"""The commands with a bundle: there, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from latency.backends.onnxruntime import OnnxRuntime
from latency.backends.torch_cpu import TorchCPU
from latency.table import LatencyTable, Target
from supernet_scripts.measured import compiles

TINY = [
    "data=digits", "data.img_size=8", "space.stages=[[8,1,2]]", "space.first_chs=8",
    "space.kernels=[3,5]", "latency.rounds=4", "latency.min_rounds=2", "latency.burst_ms=0.1",
    "latency.network_rounds=4", "latency.num_fit=2", "latency.num_held_out=1",
]  # fmt: skip


def run(command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    words = [sys.executable, "-m", f"supernet_scripts.{command}", *TINY, *arguments]
    return subprocess.run(
        words, cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )


@pytest.mark.slow
def test_a_bundle_there_and_back(tmp_path: Path) -> None:
    sent = run("validate", "backend=bundle", "latency.target.device=pi", cwd=tmp_path)
    assert sent.returncode == 0, sent.stderr
    assert "wrote latency_bundle.zip" in sent.stdout and "import=result.json" in sent.stdout
    assert not (tmp_path / "latency_table.json").exists()
    zipfile.ZipFile(tmp_path / "latency_bundle.zip").extractall(tmp_path / "device")
    runner = [sys.executable, "-I", str(tmp_path / "device" / "runner.py")]
    subprocess.run(runner, check=True, capture_output=True)
    result = tmp_path / "device" / "result.json"

    other = run("validate", f"import={result}", "seed=1", cwd=tmp_path)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "other operations under the names network" in other.stderr
    assert not (tmp_path / "latency_table.json").exists()

    back = run("validate", f"import={result}", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert "calibrated on 2 networks" in back.stdout
    table = LatencyTable.load(tmp_path / "latency_table.json")
    assert (table.target.device, table.target.runtime) == ("pi", "onnxruntime")
    assert len(table.calibrations) == 1
    device = json.loads(result.read_text())["device"]
    assert table.provenance["device_name"] == device["device_name"]

    again = run("measure", f"import={result}", "output=plain.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    plain = LatencyTable.load(tmp_path / "plain.json")
    assert plain.measurements == table.measurements and not plain.calibrations


@pytest.mark.slow
def test_a_search_cannot_wait_for_a_bundle(tmp_path: Path) -> None:
    words = ["backend=bundle", "objective.budget_share=0.8", "run_dir=run"]
    done = run("search", *words, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "backend=bundle does not measure at once" in done.stderr
    assert not (tmp_path / "latency_bundle.zip").exists()


def test_a_table_measured_elsewhere_says_whether_its_runtime_compiles() -> None:
    """The search's own backend is PyTorch's eager mode then."""
    table = LatencyTable(Target(runtime="onnxruntime"), {"compiled": True}, 0.0, 1.0, {})
    eager, compiling = TorchCPU(), OnnxRuntime()
    assert compiles(eager, table) and not compiles(eager, None) and compiles(compiling, None)
    table.provenance["compiled"] = False
    assert not compiles(compiling, table)
