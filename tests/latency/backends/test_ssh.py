"""Against a real OpenSSH server on this machine."""

from __future__ import annotations

import getpass
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from latency.backends.ssh import Ssh
from latency.runner import Plan
from latency.samples import EMPTY, Operation
from latency.table import Target

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
LONG = Plan(rounds=40, min_rounds=40, warmup=1, burst_ms=5.0)

pytestmark = pytest.mark.skipif(SSHD is None, reason="no OpenSSH server is installed")


@dataclass
class Server:
    """An OpenSSH server of this user's, with a key of its own.

    Attributes:
        options: that get a client in.
        device: folder that the backend may use.
    """

    process: subprocess.Popen[bytes]
    port: int
    options: list[str]
    device: Path

    def backend(self, **settings: Any) -> Ssh:
        own = {
            "host": f"{getpass.getuser()}@127.0.0.1", "port": self.port,
            "options": self.options, "python": sys.executable, "folder": str(self.device),
            "pause_s": 0.1,
        }  # fmt: skip
        return Ssh(**{**own, **settings})

    def rounds(self) -> list[Any]:
        """What the runner's journal has so far."""
        lines = [path.read_text() for path in self.device.glob("*/rounds.jsonl")]
        return [json.loads(line) for line in "".join(lines).split("\n")[1:-1]]

    def drop_connections(self) -> None:
        """As a cable that is pulled out does: the runner is not told."""
        parents = {pid: parent for pid, parent, name in processes() if name.startswith("sshd")}
        for pid in parents:
            ancestor = pid
            while ancestor in parents:
                ancestor = parents[ancestor]
                if ancestor == self.process.pid:
                    with suppress(ProcessLookupError):  # it has ended
                        os.kill(pid, signal.SIGKILL)

    def kill_runner(self) -> None:
        for pid, _, _ in processes():
            with suppress(OSError):  # it has ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                here = any(word.startswith(os.fsencode(self.device)) for word in words)
                if here and b"-c" not in words:  # the runner, not its shell
                    os.kill(pid, signal.SIGKILL)


def processes() -> list[tuple[int, int, str]]:
    """Process, its parent and its program's name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (", 1)
        except OSError:  # it has ended
            continue
        name, numbers = rest.rsplit(") ", 1)
        found.append((int(pid), int(numbers.split()[1]), name))
    return found


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    assert SSHD is not None, "openssh-server is not installed"
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # its service would have made it
    user, host = make_key(tmp_path / "user"), make_key(tmp_path / "host")
    port = free_port()
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": host, "PidFile": tmp_path / "pid",
        "AuthorizedKeysFile": f"{user}.pub", "PasswordAuthentication": "no", "UsePAM": "no",
        "StrictModes": "no", "PermitRootLogin": "yes", "Subsystem": "sftp internal-sftp",
    }  # fmt: skip
    config = tmp_path / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with open(tmp_path / "sshd.log", "wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    known = (tmp_path / "known").resolve()
    options = ["-F", "/dev/null", "-i", str(user)]
    for option in (
        f"UserKnownHostsFile={known}", "StrictHostKeyChecking=accept-new", "IdentitiesOnly=yes",
    ):  # fmt: skip
        options += ["-o", option]
    server = Server(process, port, options, tmp_path / "device")
    try:
        end = time.monotonic() + 30
        while not answers(port):
            assert process.poll() is None and time.monotonic() < end, "sshd does not start"
            time.sleep(0.02)
        yield server
    finally:
        server.drop_connections()
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


class During(threading.Thread):
    """Strikes once the device has finished some rounds; `seen` are these."""

    def __init__(self, server: Server, strike: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.server, self.strike = server, strike
        self.seen: list[Any] = []
        self.start()

    def run(self) -> None:
        end = time.monotonic() + 60
        while len(self.server.rounds()) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        self.strike()
        self.seen = self.server.rounds()


def test_it_measures_and_leaves_nothing_behind(
    server: Server, operations: dict[str, Operation], target: Target, plan: Plan
) -> None:
    backend = server.backend()
    backend.check(target)
    assert backend.device == "127.0.0.1" and backend.is_here
    found = backend.sample(operations, target, plan)
    assert list(found.names) == [EMPTY, *operations]
    assert found.measurement("conv").median_ms > found.measurement("relu").median_ms > 0
    assert found.device == backend.describe()
    assert f"{os.cpu_count()} cores" in found.device["device_name"]
    assert list(server.device.iterdir()) == []


@pytest.mark.slow
def test_a_dropped_connection_is_made_again(
    server: Server, operations: dict[str, Operation], target: Target,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    during = During(server, server.drop_connections)
    with caplog.at_level(logging.WARNING):
        found = server.backend().sample(operations, target, LONG)
    during.join()
    assert "connecting again in 0.1 s" in caplog.text
    assert 4 <= len(during.seen) < LONG.rounds
    assert found.rows[: len(during.seen)] == during.seen and len(found.rows) == LONG.rounds


@pytest.mark.slow
def test_a_killed_runner_goes_on_with_the_same_command(
    server: Server, operations: dict[str, Operation], target: Target
) -> None:
    during = During(server, server.kill_runner)
    with pytest.raises(ValueError, match=r"ended with 137 .*after: round \d+ of at most 40"):
        server.backend().sample(operations, target, LONG)
    during.join()
    (models,) = server.device.glob("*/models")
    before = {path.name: path.stat().st_mtime_ns for path in models.iterdir()}
    sent = []

    class Watched(Ssh):
        def _scp(self, sources: Any, destination: object) -> None:
            sent.extend(Path(str(source)).name for source in sources)
            super()._scp(sources, destination)

    backend = server.backend()
    backend.__class__ = Watched
    next(models.iterdir()).write_bytes(b"half a file")
    found = backend.sample(operations, target, LONG)
    assert found.rows[: len(during.seen)] == during.seen and len(found.rows) == LONG.rounds
    assert len([name for name in sent if name in before]) == 1


@pytest.mark.slow
def test_a_device_that_does_not_come_back(
    server: Server, operations: dict[str, Operation], target: Target
) -> None:
    def strike() -> None:
        server.process.kill()
        server.drop_connections()

    during = During(server, strike)
    with pytest.raises(ValueError, match="Connection refused.*the same command goes on"):
        server.backend(reconnects=2).sample(operations, target, LONG)
    during.join()
    kept = server.rounds() or json.loads(next(server.device.glob("*/result.json")).read_text())
    assert len(during.seen) >= 4 and kept


def test_an_operation_that_does_not_run_on_the_device(
    server: Server, operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    """There the runtime refuses every model with two inputs."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "sitecustomize.py").write_text(
        "import onnxruntime\n"
        "original = onnxruntime.InferenceSession.run\n"
        "def run(self, names, feeds):\n"
        "    if len(feeds) == 2:\n"
        "        raise RuntimeError('no such kernel')\n"
        "    return original(self, names, feeds)\n"
        "onnxruntime.InferenceSession.run = run\n"
    )
    python = f"env PYTHONPATH={tmp_path / 'shadow'} {sys.executable}"
    with pytest.raises(ValueError) as found:
        server.backend(python=python).sample(operations, target, plan)
    for words in ("1 operations do not run", "stage1_0=skip (sum): no such kernel",
                  "'exclude=[\"stage1_0=skip\"]'"):  # fmt: skip
        assert words in str(found.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("host", "Could not resolve hostname .*; check backend.host"),
        ("key", r"Permission denied .*; `ssh \S+@127.0.0.1` has to work without a password"),
        ("port", "Connection refused; enable the ssh server"),
        ("unknown", "Host key verification failed; run `ssh .*` once by hand"),
        ("python", "has no no-such-python: install Python 3.8 or later"),
        ("numpy", "runner.py needs numpy and onnxruntime: python3 -m pip install"),
        ("onnxruntime", "runner.py: no onnxruntime here; python3 -m pip install onnxruntime"),
        ("provider", "has no provider 'MyExecutionProvider' here; valid: .*CPUExecutionProvider"),
    ],
)
def test_what_is_said_of_a_device_that_cannot_be_used(
    server: Server, operations: dict[str, Operation], target: Target, plan: Plan, case: str,
    message: str, tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "onnxruntime.py").write_text("raise ImportError('no onnxruntime here')")
    replaced = {
        "key": ["-i", str(make_key(tmp_path / "stranger")), *server.options[4:]],
        "unknown": [w.replace("accept-new", "yes") for w in server.options],
    }
    settings = {
        "host": {"host": "no-such-host.invalid"},
        "port": {"port": free_port()},
        "python": {"python": "no-such-python"},
        "numpy": {"python": f"{sys.executable} -S"},
        "onnxruntime": {"python": f"env PYTHONPATH={tmp_path / 'shadow'} {sys.executable}"},
        "provider": {"provider": "MyExecutionProvider"},
    }.get(case) or {"options": replaced[case]}
    with pytest.raises(ValueError, match=message) as found:
        server.backend(**settings).sample(operations, target, plan)
    assert "\n" not in str(found.value)
    assert not server.device.exists()


def test_without_ssh_here(
    server: Server, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="backend=ssh needs ssh"):
        server.backend().describe()
