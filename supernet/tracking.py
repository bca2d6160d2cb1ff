"""Metrics of a run: JSON lines in the run folder, which are the truth, and a mirror of them."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

from supernet.files import write_text

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
Mode = Literal["online", "offline", "disabled"]
_EXIT_GRACE_S = 5.0  # what finish waits beyond wandb's own timeout before it gives up on wandb


class Journal:
    """Append-only JSON lines; a line is complete in the file when `write` returns.

    A checkpoint records `state`; after an interruption `truncate(state)` brings the file back to
    it. A last line that was cut off by a kill is removed on opening.

    Args:
        path: of the file, made when it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    @property
    def state(self) -> int:
        """Size in bytes. The lines so far are on disk, so that a checkpoint may rely on them."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. NaN and infinities become null: the file is strict JSON.

        Args:
            record: JSON values under text keys.
        """
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")

    def truncate(self, state: int) -> None:
        """Cut what was written after `state` was read.

        Raises:
            ValueError: the file is not the one `state` was read from.
        """
        content = self.path.read_bytes()
        if len(content) < state:
            raise ValueError(
                f"{self.path} holds {len(content)} bytes, but the checkpoint was made after "
                f"{state}: the file was replaced or shortened; start the run anew"
            )
        if state > 0 and content[state - 1 : state] != b"\n":
            raise ValueError(
                f"{self.path} has no line that ends at byte {state}, where the checkpoint was "
                "made: the file was edited; start the run anew"
            )
        os.truncate(self.path, state)


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete lines of a journal; none when there is no such file.

    Raises:
        ValueError: a line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    # what follows the last line feed is a line that is being written, or was cut off by a kill
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line[:40]!r}")
        records.append(record)
    return records


def last_epoch(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of the epoch that a search ended as it was after: the last one, or that which the
    monitor of collapse went back to; None where no epoch has ended."""
    epochs = {r["epoch"]: r for r in records if r["phase"] in ("warmup", "search")}
    good = [r["good_epoch"] for r in records if r["phase"] == "monitor"]
    back = good[-1] if good else None
    return epochs.get(max(epochs, default=None) if back is None else back)


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics record under flat names, nested ones joined by a slash.

    Probabilities, architectures, texts, lists and nulls have no curve and are left out.

    Returns:
        {name: number}; {"a": {"b": 1}} becomes {"a/b": 1}.
    """
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key in ("probabilities", "architecture"):
            continue
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": number for name, number in flatten(value).items()})
        elif isinstance(value, int | float):
            flat[key] = value
    return flat


class Tracker(ABC):
    """Mirrors a run's metrics somewhere else. Used as a context manager, it always finishes.

    The journal is written before the tracker is called; a tracker that fails says so once and
    never stops a run.
    """

    @abstractmethod
    def start(
        self,
        config: Mapping[str, Any],
        run_dir: str | os.PathLike[str],
        *,
        resume: bool = False,
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        """Begin, before anything is logged.

        Args:
            config: resolved configuration, JSON values.
            run_dir: folder of the run.
            resume: continue what was tracked for this folder before.
            group: joins the jobs of one sweep.
            name: of the run, for people.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One set of numbers (see `flatten`) at a global step; several sets may share a step."""

    @abstractmethod
    def artifact(self, path: str | os.PathLike[str], name: str, type: str) -> None:
        """A file of the run; it must stay as it is until `finish`."""

    @abstractmethod
    def finish(self, exit_code: int = 0) -> None:
        """End, in bounded time; a second call does nothing.

        Args:
            exit_code: 0 when the run succeeded.
        """

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)


class NoTracker(Tracker):
    """Tracks nothing."""

    def start(
        self,
        config: Mapping[str, Any],
        run_dir: str | os.PathLike[str],
        *,
        resume: bool = False,
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def artifact(self, path: str | os.PathLike[str], name: str, type: str) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass


class WandbTracker(Tracker):
    """Weights & Biases, silent on the console.

    Everything after `start` happens in a thread of its own, so that a slow or stuck wandb delays
    the end of a run by at most `finish_timeout_s` (and a few seconds), and training not at all.
    Offline, a resumed run continues in a second folder of the same run id: `wandb sync` both.

    Args:
        project: name of the project.
        mode: "online", "offline" (kept in the run folder, for `wandb sync`) or "disabled".
        entity: user or team; None is the account's default.
        tags: of the run.
        init_timeout_s: seconds that `start` may take to reach the server.
        finish_timeout_s: seconds that `finish` may take to send what is left.
    """

    def __init__(
        self,
        project: str,
        mode: Mode = "online",
        entity: str | None = None,
        tags: Sequence[str] = (),
        init_timeout_s: float = 60.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"wandb has no mode {mode!r}; valid: {', '.join(get_args(Mode))}")
        for name, value in (("init", init_timeout_s), ("finish", finish_timeout_s)):
            if not value > 0:
                raise ValueError(f"{name}_timeout_s must be above 0, not {value}")
        self.project, self.entity, self.tags = project, entity, tuple(tags)
        self.mode: Mode = mode
        self.init_timeout_s, self.finish_timeout_s = init_timeout_s, finish_timeout_s
        self._run: Run | None = None
        self._worker = _Worker()

    def start(
        self,
        config: Mapping[str, Any],
        run_dir: str | os.PathLike[str],
        *,
        resume: bool = False,
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        try:
            self._run = self._init(config, Path(run_dir), resume, group, name)
        except Exception as error:
            _warn(error)

    def _init(
        self,
        config: Mapping[str, Any],
        run_dir: Path,
        resume: bool,
        group: str | None,
        name: str | None,
    ) -> Run:
        import wandb

        id_file = run_dir / RUN_ID_FILE
        resume = resume and id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if resume else uuid.uuid4().hex[:12]
        if not resume:
            write_text(id_file, run_id + "\n")
        settings = wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=self.init_timeout_s,
            login_timeout=self.init_timeout_s,
            finish_timeout=self.finish_timeout_s,
        )
        wandb.setup(settings)  # what it says while it logs in is not silenced by the run's settings
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            tags=self.tags,
            mode=self.mode,
            dir=run_dir,
            id=run_id,
            # offline there is no server to ask, and wandb warns about the argument
            resume="allow" if resume and self.mode == "online" else None,
            # never the run that an earlier job of this process could not finish
            reinit="create_new",
            config=dict(config),
            group=group,
            name=name,
            settings=settings,
        )
        # wandb's own step must grow with every row, and drops the rows that a resumed run repeats
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if (run := self._run) is not None:
            row = {**metrics, "step": step}
            self._worker.submit(lambda: run.log(row))

    def artifact(self, path: str | os.PathLike[str], name: str, type: str) -> None:
        if (run := self._run) is not None:
            file = os.fspath(path)
            self._worker.submit(lambda: _log_artifact(run, file, name, type))

    def finish(self, exit_code: int = 0) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        self._worker.submit(lambda: run.finish(exit_code=exit_code), always=True)
        if not self._worker.join(self.finish_timeout_s + _EXIT_GRACE_S):
            log.warning(
                "wandb did not finish within %g s; metrics.jsonl has everything",
                self.finish_timeout_s,
            )


def _log_artifact(run: Run, file: str, name: str, type: str) -> None:
    import wandb

    artifact = wandb.Artifact(name=name, type=type)
    artifact.add_file(file)
    run.log_artifact(artifact)


class _Worker:
    """Runs tasks one after another in a daemon thread; after a task that failed, none but those
    that are asked for `always`."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], bool] | None]
        self._tasks = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], object], always: bool = False) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
            self._thread.start()
        self._tasks.put((task, always))

    def join(self, timeout_s: float) -> bool:
        """Wait for the tasks so far; False when the time was up first."""
        assert self._thread is not None
        self._tasks.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        failed = False
        while (item := self._tasks.get()) is not None:
            task, always = item
            if failed and not always:
                continue
            try:
                task()
            except Exception as error:
                if not failed:
                    _warn(error)
                failed = True


def _warn(error: Exception) -> None:
    """The one warning; what wandb says of itself would fill the console."""
    log.warning(
        "tracking with wandb is off (%s: %s); metrics.jsonl has everything",
        type(error).__name__,
        error,
    )


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
