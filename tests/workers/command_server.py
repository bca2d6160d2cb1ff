"""Runs the commands, each in a process forked off this one, which has imported everything once.

One JSON object a line comes in: command, arguments, cwd, env, stdout and stderr (files), report
(false: leave the pictures out, half of a tiny search's time), and kill (null, or [moment, which]:
the process ends itself by SIGKILL at that moment). The exit code goes out, negative for a signal.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # noqa: F401
from hydra.core.plugins import Plugins

from latency import runner
from supernet.files import write_text
from supernet.learner import Learner
from supernet.objective import Budget
from supernet.strategies.first_order import FirstOrder
from supernet.tracking import Journal

MODULES = {
    name: import_module(f"supernet_scripts.{name}")
    for name in ("search", "derive", "measure", "retrain", "validate", "compare")
}


def serve() -> dict[str, Any] | None:
    """In a forked process: its request. In the server: None, when there are no more."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        process = os.fork()
        if process == 0:
            return request
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Look to the command like a process of its own."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if not request["report"]:
        MODULES["search"].write_report = lambda run: write_text(run / "report.html", "")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = [f"supernet-{request['command']}", *request["arguments"]]


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(holder: Any, name: str, which: int, strike: Callable[..., None] = die) -> None:
    """After the call number `which` (from 1) of a method, `strike` with the call's arguments."""
    original, count = getattr(holder, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = original(*args, **kwargs)
        if count == which:
            strike(*args)
        return result

    setattr(holder, name, counted)


def half_a_line(journal: Journal, _: Any) -> None:
    """As if the write of the last line had not come to its end."""
    content = journal.path.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    os.truncate(journal.path, (start + len(content)) // 2)
    die()


def at_replace(name: str, which: int, whole: bool) -> None:
    """While a file of this name is written, for the time number `which`."""
    original, count = os.replace, 0

    def replace(source: Any, destination: Any, **kwargs: Any) -> None:
        nonlocal count
        count += os.path.basename(destination) == name
        if count == which:
            if not whole:
                os.truncate(source, os.path.getsize(source) // 2)
            die()
        original(source, destination, **kwargs)

    os.replace = replace


def arm(moment: str, which: int) -> None:
    kind, _, file = moment.partition(" ")
    if kind in ("written", "half-written"):
        at_replace(file, which, whole=kind == "written")
    elif kind == "line":
        at_call(Journal, "write", which, half_a_line)
    else:
        holder, name = {
            "weight-step": (FirstOrder, "weight_step"),
            "architecture-step": (Budget, "update"),  # logits moved, meters not yet
            "retrain-step": (Learner, "take_step"),
            "round": (runner.Journal, "add"),
        }[kind]
        at_call(holder, name, which)


def run(main: Callable[[], None]) -> None:
    """And end as Python does, but without taking apart all that was imported: seconds a command."""
    code: object = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


Plugins.instance()  # finds them by importing them

if __name__ == "__main__":
    request = serve()
    if request is None:
        os._exit(0)
    become(request)
    if request["kill"] is not None:
        arm(*request["kill"])
    run(MODULES[request["command"]].main)
