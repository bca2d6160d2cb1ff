"""The journal of a run, and trackers that must not disturb it."""

import importlib.util
import json
import logging
import sys
import threading
import time
import types

import pytest

from supernet import tracking
from supernet.tracking import Journal, NoTracker, WandbTracker, flatten, read_journal


def test_journal_lines_are_readable_at_once(tmp_path):
    journal = Journal(tmp_path / "deep" / "metrics.jsonl")
    journal.write({"step": 1, "loss": 0.5, "name": "größe"})
    assert read_journal(journal.path) == [{"step": 1, "loss": 0.5, "name": "größe"}]
    assert journal.state == journal.path.stat().st_size > 0


def test_journal_is_strict_json(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    nan, inf = float("nan"), float("inf")
    journal.write({"a": nan, "b": {"c": [1.0, inf]}, "d": (-inf, 2)})

    def refuse(constant):
        raise AssertionError(constant)

    line = journal.path.read_text()
    expected = {"a": None, "b": {"c": [1.0, None]}, "d": [None, 2]}
    assert json.loads(line, parse_constant=refuse) == expected


@pytest.mark.parametrize("rest", ["", '{"step": 3}\n', '{"step": 3}\n{"st', '{"st'])
def test_resumed_journal_is_bytewise_the_uninterrupted_one(tmp_path, rest):
    whole = Journal(tmp_path / "whole.jsonl")
    cut = Journal(tmp_path / "cut.jsonl")
    for step in (1, 2):
        whole.write({"step": step})
        cut.write({"step": step})
    state = cut.state
    with open(cut.path, "a") as file:  # what a killed process may have left after the checkpoint
        file.write(rest)
    resumed = Journal(cut.path)
    resumed.truncate(state)
    for step in (3, 4):
        whole.write({"step": step})
        resumed.write({"step": step})
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert resumed.state == whole.state


def test_opening_removes_a_half_written_line(tmp_path):
    path = tmp_path / "timing.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "sec')
    assert read_journal(path) == [{"step": 1}]
    Journal(path).write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_truncate_to_nothing(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1})
    journal.truncate(0)
    assert journal.path.read_bytes() == b""


@pytest.mark.parametrize("state", [1000, 5])
def test_truncate_refuses_another_file(tmp_path, state):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1})
    with pytest.raises(ValueError, match="start the run anew"):
        journal.truncate(state)
    assert read_journal(journal.path) == [{"step": 1}]


def test_read_journal(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == []
    for content, match in (("{}\nnot json\n", "line 2"), ("[1]\n", "line 1 is not a JSON object")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match=match):
            read_journal(tmp_path / "bad.jsonl")


def test_flatten_keeps_the_numbers():
    record = {
        "step": 3,
        "phase": "search",
        "loss": 0.5,
        "multiplier": None,
        "measured": {"median_ms": 1.5, "deeper": {"n": 2}},
        "probabilities": {"edge": [0.5, 0.5]},
        "architecture": {"edge": "conv"},
        "list": [1, 2],
    }
    expected = {"step": 3, "loss": 0.5, "measured/median_ms": 1.5, "measured/deeper/n": 2}
    assert flatten(record) == expected


# ---- a fake wandb ----


class FakeRun:
    def __init__(self, fail=False, hang=False):
        self.rows, self.exit_codes, self.fail, self.hang = [], [], fail, hang
        self.metrics, self.attempts = {}, 0
        self.released = threading.Event()

    def define_metric(self, name, **settings):
        self.metrics[name] = settings

    def log(self, row):
        self.attempts += 1
        if self.fail:
            raise RuntimeError("server says no")
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)
        if self.hang:
            self.released.wait(60)


def fake_wandb(monkeypatch, run):
    module = types.ModuleType("wandb")
    module.inits = []
    module.Settings = lambda **settings: settings
    module.setup = lambda settings: None

    def init(**arguments):
        module.inits.append(arguments)
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_rows_share_one_global_step(monkeypatch, tmp_path):
    run = FakeRun()
    module = fake_wandb(monkeypatch, run)
    with WandbTracker("p", tags=["t"], entity="e") as tracker:
        tracker.start({"a": 1}, tmp_path, group="sweep", name="job 1")
        tracker.log(7, {"loss": 0.5})
        tracker.log(7, {"accuracy": 10.0})
    assert run.rows == [{"loss": 0.5, "step": 7}, {"accuracy": 10.0, "step": 7}]
    assert run.metrics["*"] == {"step_metric": "step"}
    assert run.exit_codes == [0]
    given = module.inits[0]
    assert (given["group"], given["name"], given["config"]) == ("sweep", "job 1", {"a": 1})
    assert given["settings"]["silent"] and given["settings"]["console"] == "off"


def test_resume_continues_the_same_run(monkeypatch, tmp_path):
    module = fake_wandb(monkeypatch, FakeRun())
    for resume in (False, True, False):
        with WandbTracker("p") as tracker:
            tracker.start({}, tmp_path, resume=resume)
    first, second, third = module.inits
    assert first["id"] == second["id"] != third["id"]
    assert [given["resume"] for given in module.inits] == [None, "allow", None]


def test_an_exception_marks_the_run_as_failed(monkeypatch, tmp_path):
    run = FakeRun()
    fake_wandb(monkeypatch, run)
    with pytest.raises(KeyboardInterrupt), WandbTracker("p") as tracker:
        tracker.start({}, tmp_path)
        raise KeyboardInterrupt
    assert run.exit_codes == [1]


def test_finish_that_hangs_is_left_behind(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tracking, "_EXIT_GRACE_S", 0.1)
    run = FakeRun(hang=True)
    fake_wandb(monkeypatch, run)
    tracker = WandbTracker("p", finish_timeout_s=0.1)
    tracker.start({}, tmp_path)
    began = time.monotonic()
    tracker.finish()
    tracker.finish()
    assert time.monotonic() - began < 30  # the fake hangs for 60 s
    assert run.exit_codes == [0]
    assert "did not finish within 0.1 s" in caplog.text
    run.released.set()


def test_failing_tracker_says_so_once_and_stays_off(monkeypatch, tmp_path, caplog):
    run = FakeRun(fail=True)
    fake_wandb(monkeypatch, run)
    journal = Journal(tmp_path / "metrics.jsonl")
    with caplog.at_level(logging.WARNING), WandbTracker("p") as tracker:
        tracker.start({}, tmp_path)
        for step in range(3):
            journal.write({"step": step})
            tracker.log(step, {"loss": 1.0})
    assert caplog.text.count("server says no") == 1
    assert len(caplog.records) == 1
    assert (run.attempts, run.exit_codes) == (1, [0])
    assert [record["step"] for record in read_journal(journal.path)] == [0, 1, 2]


def test_start_that_fails_is_no_failure_of_the_run(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with WandbTracker("p") as tracker:
        tracker.start({}, tmp_path)
        tracker.log(0, {"loss": 1.0})
    assert len(caplog.records) == 1
    assert "tracking with wandb is off" in caplog.text


def test_no_tracker_never_imports_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    spec = importlib.util.spec_from_file_location("tracking_again", tracking.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    with again.NoTracker() as tracker:
        tracker.start({}, tmp_path, resume=True, group="g", name="n")
        tracker.log(1, {"loss": 0.5})
        tracker.artifact(tmp_path / "missing.json", "name", "type")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"mode": "loud"}, {"init_timeout_s": 0}, {"finish_timeout_s": -1.0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="valid: online|above 0"):
        WandbTracker("p", **arguments)


# ---- the real one, without a network ----


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / f"wandb_{name}"))
    module = pytest.importorskip("wandb")
    yield module
    module.teardown()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_real_wandb_is_silent_and_keeps_its_id(wandb, tmp_path, mode, capfd, caplog):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    file = run_dir / "architecture.json"
    file.write_text("{}")
    ids = []
    for resume in (False, True):
        with WandbTracker("p", mode=mode) as tracker:
            tracker.start({"seed": 1}, run_dir, resume=resume, group="g", name="n")
            assert tracker._run is not None
            ids.append(tracker._run.id)
            for step in range(3):
                tracker.log(step, {"search/loss": float(step)})
            tracker.artifact(file, "architecture", "architecture")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert wandb.run is None
    written = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    if mode == "offline":
        assert len(written) >= 1
        assert ids[0] == ids[1] == (run_dir / tracking.RUN_ID_FILE).read_text().strip()
        assert {path.name for path in written} == {f"run-{ids[0]}.wandb"}
    else:
        assert written == []


def test_no_tracker_is_a_tracker():
    assert isinstance(NoTracker(), tracking.Tracker)
