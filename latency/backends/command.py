"""Any device and runtime: a command of the user's is given an ONNX file and prints milliseconds."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from latency.backends.base import LocalBackend
from latency.onnx_files import DTYPES, to_onnx
from latency.runner import Plan, Timer
from latency.samples import Operation, Samples
from latency.table import Target

PLACE = "{onnx}"  # where the file's path goes
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
SHOWN_LINES = 3


class Command(LocalBackend):
    """Runs a command once a burst, without a shell; it prints the ms of one call as last number.

    Args:
        command: words as in a shell, `{onnx}` among them.
        timeout_s: of one run of it.
        device, runtime: of a target that names none.
    """

    dtypes = DTYPES
    framed = True
    devices = "any name"

    def __init__(
        self,
        command: str,
        timeout_s: float = 600.0,
        device: str = "device",
        runtime: str = "command",
    ) -> None:
        self.words = shlex.split(command)
        if not any(PLACE in word for word in self.words):
            raise ValueError(
                f"backend.command={command!r} has no {PLACE}, which stands for the ONNX file"
            )
        self.timeout_s, self.device, self.runtime = timeout_s, device, runtime

    def accepts_device(self, device: str) -> bool:
        return True

    def accepts_runtime(self, runtime: str) -> bool:
        return True

    def describe(self) -> dict[str, str]:
        return {"device_name": shlex.join(self.words)}

    def sample(
        self,
        operations: Mapping[str, Operation],
        target: Target,
        plan: Plan,
        journal: Path | None = None,
        show: bool = True,
    ) -> Samples:
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            return super().sample(operations, target, replace(plan, burst_ms=0), journal, show)

    def prepare(self, operation: Operation, target: Target) -> Timer:
        model = to_onnx(operation, target.dtype)
        path = self.folder / f"{hashlib.sha256(model).hexdigest()[:16]}.onnx"
        path.write_bytes(model)
        words = [word.replace(PLACE, str(path)) for word in self.words]
        return lambda num_calls: run(words, self.timeout_s)


def run(words: list[str], timeout_s: float) -> float:
    """The last number that the command prints.

    Raises:
        ValueError: it fails, takes too long, or prints no number above 0.
    """
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]} took longer than backend.timeout_s={timeout_s:g}") from None
    except OSError as error:
        raise ValueError(f"{words[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ValueError(f"{words[0]} ended with {done.returncode}{_last(done)}")
    numbers = NUMBER.findall(done.stdout)
    if not numbers:
        raise ValueError(f"{words[0]} printed no number{_last(done)}")
    if not 0 < (ms := float(numbers[-1])) < float("inf"):
        raise ValueError(f"{words[0]} printed {numbers[-1]}, not a time{_last(done)}")
    return ms


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines that were printed, in one."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return f"; it printed: {' | '.join(lines[-SHOWN_LINES:])}" if lines else ""
