"""Peak memory, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_step.py"


def peak(mixed_op: str) -> float:
    """MiB beyond the import, of weight steps at 32x32 and batch 64 in the small MBConv space."""
    code = (
        "import runpy, json; "
        f"work = runpy.run_path({str(SCRIPT)!r})['work']; "
        f"print(work('mbconv_small', {mixed_op!r}, 64, 9, True)['peak_mib'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_sampled_weight_step_needs_the_memory_of_one_network() -> None:
    """Nine steps take every candidate once, so that all have their momentum."""
    one, sampled = peak("one network"), peak("binary_gate")
    assert one > 100
    assert sampled <= 1.3 * one
