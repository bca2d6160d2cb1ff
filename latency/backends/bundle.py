"""onnxruntime on a device that the user takes an archive to, and brings a result from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latency.backends.base import Backend
from latency.bundle import archive_id, pack, read_result, samples, write_bundle
from latency.onnx_files import DTYPES
from latency.runner import CPU, Plan
from latency.samples import Elsewhere, Operation, Samples
from latency.table import Target

STEPS = """\
wrote {path}: {count} operations, {size:.1f} MB. What remains to be done:
  1. Copy it to the device: scp {path} USER@DEVICE:
  2. There, with Python 3.8 or later, numpy and onnxruntime:
       python3 -m zipfile -e {path.name} {path.stem}
       python3 {path.stem}/runner.py
     It goes on where it was when it is started again.
  3. Bring {path.stem}/result.json back, and give this command again with import=result.json"""


class Bundle(Backend):
    """Writes an archive to be measured elsewhere, or reads the result that came back.

    Args:
        path: of the archive.
        result: of its runner; None writes the archive.
        provider, provider_options: of the device's onnxruntime, in its form.
        device: of a target that names none.
    """

    runtime = "onnxruntime"
    dtypes = DTYPES
    framed = True
    devices = "any name"

    def __init__(
        self,
        path: str = "latency_bundle.zip",
        result: str | None = None,
        provider: str = CPU,
        provider_options: Mapping[str, Any] | None = None,
        device: str = "device",
    ) -> None:
        self.path = Path(path)
        self.result = None if result is None else read_result(result)
        self.is_here = self.result is not None
        self.provider, self.options = provider, dict(provider_options or {})
        self.device = device if self.result is None else self.result["target"]["device"]
        if self.result and self.path.exists():
            expected, found = archive_id(self.path), self.result["bundle"]
            if found != expected:
                raise ValueError(
                    f"{result} is of another bundle than {path}: {found}, not {expected}; name "
                    "the archive it came from with backend=bundle backend.path=FILE, or a file "
                    "that does not exist if it is gone"
                )

    def accepts_device(self, device: str) -> bool:
        return True

    def check(self, target: Target) -> None:
        super().check(target)
        if self.result is not None:
            measured, asked = self.result["target"], asdict(target)
            if differ := [name for name in asked if asked[name] != measured[name]]:
                words = " ".join(f"latency.target.{name}={measured[name]}" for name in differ)
                raise ValueError(f"the result is for another target; give {words}")

    def describe(self) -> dict[str, str]:
        """The device's own description.

        Raises:
            ValueError: there is no result yet.
        """
        if self.result is None:
            raise ValueError(
                "backend=bundle does not measure at once: make a table with supernet-measure or "
                "supernet-validate backend=bundle first, and give it as latency.table=FILE"
            )
        device: dict[str, str] = self.result["device"]
        return device

    def sample(
        self,
        operations: Mapping[str, Operation],
        target: Target,
        plan: Plan,
        journal: Path | None = None,
        show: bool = True,
    ) -> Samples:
        if self.result is not None:
            return samples(self.result, operations.items())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_bundle(folder, operations, target, plan, self.provider, self.options, show)
            pack(folder, self.path)
        size = self.path.stat().st_size / 1e6
        raise Elsewhere(STEPS.format(path=self.path, count=len(operations), size=size))
