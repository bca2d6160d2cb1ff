"""Peak memory, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def peaks(folder: Path, *overrides: str) -> dict[str, float]:
    """MiB beyond the import, by form, at 32x32 and batch 64 in the small MBConv space."""
    settings = ("space=mbconv_small", "rounds=1", f"output={folder / 'out.json'}", *overrides)
    command = [sys.executable, "-m", "supernet_scripts.benchmark_step", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (entry,) = json.loads((folder / "out.json").read_text())["entries"]
    return {form: row["peak_mib"] for form, row in entry["forms"].items()}


@pytest.mark.slow
def test_a_sampled_weight_step_needs_the_memory_of_one_network(tmp_path: Path) -> None:
    """Every candidate has run once by then, so that all have their momentum."""
    found = peaks(tmp_path, "mixed_op=binary_gate", "step=weights", "forms=[grouped,network]")
    assert found["network"] > 100
    assert found["grouped"] <= 1.3 * found["network"]
