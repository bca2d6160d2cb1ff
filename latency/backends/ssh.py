"""onnxruntime on a device within reach of the system's ssh and scp."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from latency.backends.base import Backend
from latency.bundle import RUNNER, read_result, samples, write_bundle
from latency.onnx_files import DTYPES
from latency.runner import CPU, Plan
from latency.samples import Operation, Samples
from latency.table import Target

log = logging.getLogger(__name__)

# The first value counts, so that the user's options come before these. A connection that is lost
# without a word is noticed within a minute.
OPTIONS = [
    word
    for option in (
        "BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=3",
        "LogLevel=ERROR",
    )
    for word in ("-o", option)
]  # fmt: skip
LOST = 255  # exit status of ssh and scp
NOT_FOUND = 127  # of a shell
ADVICE = {
    "Could not resolve hostname": "check backend.host, or give the device's IP address",
    "Permission denied": "`ssh {host}` has to work without a password: ssh-copy-id {host}, or "
    "name a key with 'backend.options=[-i,FILE]'",
    "Host key verification failed": "run `ssh {host}` once by hand and accept the key",
    "Connection refused": "enable the ssh server on the device, or name its port "
    "with backend.port",
    "timed out": "is the device switched on and in this network?",
    "No route to host": "is the device switched on and in this network?",
}


class Disconnected(ValueError):
    """The connection could not be made, or was lost."""


class Ssh(Backend):
    """Copies a bundle to a device, has it measured there and fetches the result.

    The device keeps the finished rounds: a lost connection is made again, and the same command
    later on goes on where this one ended. Its folder is deleted when all is measured.

    Args:
        host: as ssh takes it.
        port: its own default when None.
        options: of both ssh and scp.
        python: on the device, in the words of its shell.
        folder: on the device, relative to the user's home.
        provider, provider_options: of the device's onnxruntime, in its form.
        reconnects: times that a lost connection is made again.
        pause_s: before each.
    """

    runtime = "onnxruntime"
    dtypes = DTYPES
    framed = True
    devices = "any name"

    def __init__(
        self,
        host: str,
        port: int | None = None,
        options: Sequence[str] = (),
        python: str = "python3",
        folder: str = ".cache/supernet",
        provider: str = CPU,
        provider_options: Mapping[str, Any] | None = None,
        reconnects: int = 10,
        pause_s: float = 5.0,
    ) -> None:
        own = [] if port is None else ["-o", f"Port={port}"]
        self.host, self.options = host, [*own, *map(str, options), *OPTIONS]
        self.python, self.folder = python, folder
        self.provider, self.provider_options = provider, dict(provider_options or {})
        self.reconnects, self.pause_s = reconnects, pause_s
        self.device = host.rpartition("@")[2]

    def accepts_device(self, device: str) -> bool:
        return True

    def describe(self) -> dict[str, str]:
        """As the runner sees the device.

        Raises:
            ValueError: the device is out of reach, or lacks what the runner needs.
        """
        return self._description

    @cached_property
    def _description(self) -> dict[str, str]:
        options = shlex.quote(json.dumps(self.provider_options))
        arguments = f"--provider {shlex.quote(self.provider)} --describe {options}"
        with RUNNER.open() as program:
            found: dict[str, str] = self._answer(f"{self.python} - {arguments}", program)
        return found

    def sample(
        self,
        operations: Mapping[str, Operation],
        target: Target,
        plan: Plan,
        journal: Path | None = None,
        show: bool = True,
    ) -> Samples:
        self.describe()  # before anything that takes long
        with tempfile.TemporaryDirectory() as name:
            local = Path(name)
            manifest = write_bundle(
                local, operations, target, plan, self.provider, self.provider_options, show
            )
            remote = f"{self.folder}/{manifest['id']}"
            log.info("measuring %d operations on %s", len(operations), self.host)
            self._persist(lambda: self._measure(local, remote, list(manifest["files"]), show))
            found = samples(read_result(local / "result.json"), operations.items())
        try:
            self._ssh(f"rm -rf {shlex.quote(remote)}")
        except ValueError as error:
            log.warning("%s remains on the device: %s", remote, error)
        return found

    def _persist(self, task: Callable[[], None]) -> None:
        for attempt in range(self.reconnects + 1):
            try:
                return task()
            except Disconnected as error:
                if attempt == self.reconnects:
                    raise ValueError(
                        f"{error}; the device keeps what was measured: the same command goes on"
                    ) from None
                log.warning("%s; connecting again in %g s", error, self.pause_s)
                time.sleep(self.pause_s)

    def _measure(self, local: Path, remote: str, files: Sequence[str], show: bool) -> None:
        runner = f"{self.python} {shlex.quote(f'{remote}/runner.py')}"
        self._ssh(f"mkdir -p {shlex.quote(f'{remote}/models')}")
        self._scp([local / "manifest.json", local / "runner.py"], f"{self.host}:{remote}/")
        if missing := self._answer(f"{runner} --damaged"):
            assert set(missing) <= set(files), missing
            self._scp([local / name for name in missing], f"{self.host}:{remote}/models/")
        with tqdm(bar_format="{desc}", leave=False, disable=None if show else True) as bar:
            self._ssh(f"{runner}; exit $?", show=bar.set_description_str)
        self._scp([f"{self.host}:{remote}/result.json"], local)

    def _answer(self, command: str, program: IO[str] | None = None) -> Any:
        """The JSON value that a command prints on the device; its shell may greet before."""
        return json.loads(self._ssh(command, program).splitlines()[-1])

    def _ssh(
        self,
        command: str,
        program: IO[str] | None = None,
        show: Callable[[str], object] = lambda line: None,
    ) -> str:
        return self._run(["ssh", *self.options, self.host, command], program, show)

    def _scp(self, sources: Sequence[object], destination: object) -> None:
        self._run(["scp", "-q", "-C", *self.options, *map(str, sources), str(destination)])

    def _run(
        self,
        words: Sequence[str],
        program: IO[str] | None = None,
        show: Callable[[str], object] = lambda line: None,
    ) -> str:
        """What a program of ssh's prints.

        Args:
            program: its input.
            show: told each line as it comes.

        Raises:
            Disconnected: and why, and what to do.
            ValueError: the command failed on the device.
        """
        lines = []
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            try:
                process = subprocess.Popen(
                    words, stdin=program or subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=errors, text=True, errors="replace",
                )  # fmt: skip
            except OSError as error:
                raise ValueError(f"backend=ssh needs {words[0]}: {error.strerror}") from None
            with process:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.append(line)
                    show(line.strip())
            errors.seek(0)
            said = errors.read().strip()
        if process.returncode == LOST:
            raise Disconnected(self._lost(said))
        if process.returncode:
            raise ValueError(self._failed(process.returncode, said, lines))
        return "".join(lines)

    def _lost(self, said: str) -> str:
        reason = said.splitlines()[-1].rstrip(".") if said else "the connection was lost"
        advice = [text for words, text in ADVICE.items() if words in said]
        return f"{self.host}: {reason}" + "".join(f"; {t.format(host=self.host)}" for t in advice)

    def _failed(self, code: int, said: str, lines: Sequence[str]) -> str:
        if code == NOT_FOUND:
            return (
                f"{self.host} has no {self.python}: install Python 3.8 or later there, or name it "
                "with backend.python=PATH"
            )
        if "SyntaxError" in said:
            return f"{self.host}: {self.python} is older than 3.8; name another with backend.python"
        if found := re.search(r"^runner\.py.*", said, re.MULTILINE | re.DOTALL):
            return f"{self.host}: {found.group()}"
        words = [*said.splitlines()[-1:], *(f"after: {line.strip()}" for line in lines[-1:])]
        return (
            f"{self.host}: a command ended with {code} ({', '.join(words)}); the device keeps what "
            "was measured: the same command goes on"
        )
