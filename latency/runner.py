#!/usr/bin/env python3
"""How latencies are measured: bursts in rounds, beside a reference. Also the program of a bundle.

Unpacked on a device, `python3 runner.py` measures the ONNX files beside it and writes result.json;
started again after an interruption it goes on. This file alone runs there: it needs Python 3.8,
numpy and onnxruntime, and nothing else of its package.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import math
import os
import platform
import random
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, Sequence

try:
    import numpy as np
except ImportError:
    sys.exit("runner.py needs numpy and onnxruntime: python3 -m pip install numpy onnxruntime")

BUNDLE = {"format": "supernet.latency_bundle", "version": 1}
RESULT = {"format": "supernet.latency_result", "version": 1}
EMPTY = "an empty call"  # the operation that computes nothing
CPU = "CPUExecutionProvider"
RAPL = "/sys/class/powercap"  # energy counters of CPUs, on Linux
SHOW_EVERY_S = 1.0

MAX_CALLS = 10_000
MAX_GROWTH = 10.0  # of a burst at a time: short bursts overestimate a call
REFERENCE = -1  # stands for the reference among the operations' positions
REFERENCE_EVERY = 6  # bursts between two of the reference
LOOK_EVERY = 5  # rounds between two looks at the precision
MIN_FOR_CI = 6  # bursts; the extremes of fewer enclose the median with less than 95%
NEIGHBOURS = 7  # bursts to either side that tell how fast the device was

Timer = Callable[[int], float]  # number of calls in one burst -> mean ms of a call
# One round, burst by burst: "order" (which operation), "ms" (of a call), perhaps "mj" (energy of a
# call); and "seconds" since the first round began.
Row = Dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: most bursts of an operation.
        min_rounds: fewest.
        warmup: calls before an operation's first burst.
        burst_ms: about how long a burst lasts; at least one call, with 0 exactly one.
        precision: an operation is done when the 95% confidence interval of its median reaches at
            most this share of it to either side.
        time_limit_s: rounds begin only before this many seconds have gone by.
        seed: of the order within the rounds.
    """

    rounds: int = 60
    min_rounds: int = 10
    warmup: int = 3
    burst_ms: float = 2.0
    precision: float = 0.01
    time_limit_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "min_rounds", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("precision", "time_limit_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.burst_ms < float("inf"):
            raise ValueError(f"burst_ms must be at least 0, not {self.burst_ms}")


@dataclass(frozen=True)
class Statistics:
    """Of the corrected times of one operation.

    Attributes:
        median_ms, iqr_ms: median and distance between the quartiles.
        ci_ms: half of the width of the median's 95% confidence interval; too few bursts tell
            nothing of it, and it is the median itself.
        num_runs: bursts.
        energy_mj: mean of a call, in mJ; None where the device does not tell.
    """

    median_ms: float
    iqr_ms: float
    ci_ms: float
    num_runs: int
    energy_mj: float | None = None


class Journal:
    """The rounds that are done, in a file: a header line, then one JSON line a round.

    Args:
        path: None keeps nothing.
        header: what is measured, where and how; rounds under another header don't count.
    """

    def __init__(self, path: str | None, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.note = ""  # why rounds that were there are not used

    def load(self, num_operations: int) -> list[Row]:
        """The rounds to go on from."""
        rows: list[Row] = []
        if self.path is None or not os.path.exists(self.path):
            return rows
        with open(self.path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")[:-1]  # what follows the last line end was cut short
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                if number > 1:
                    check_row(value, num_operations)
                elif not isinstance(value, dict):
                    raise ValueError("a header has fields")
            except ValueError as error:
                self.note = f"{self.path}, line {number}: {error}"
                break
            if number > 1:
                rows.append(value)
                continue
            names = sorted(value.keys() | self.header.keys())
            differ = [n for n in names if digest(value.get(n)) != digest(self.header.get(n))]
            if differ:
                self.note = f"{self.path} is of another {', '.join(differ)}"
                break
        return rows

    def start(self, rows: Sequence[Row]) -> None:
        """Write the header and the rounds to go on from."""
        if self.path is not None:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            write_lines(self.path, [self.header, *rows])

    def add(self, row: Row) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def delete(self) -> None:
        if self.path is not None and os.path.exists(self.path):
            os.remove(self.path)


def check_row(row: Any, num_operations: int) -> None:
    """Refuse what cannot be a round.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(row, dict) or not {"order", "ms", "seconds"} <= row.keys():
        raise ValueError("a round has the fields order, ms and seconds")
    if not isinstance(row["order"], list) or not all(
        type(which) is int and REFERENCE <= which < num_operations for which in row["order"]
    ):
        raise ValueError(
            f"a round's order names operations from {REFERENCE} to {num_operations - 1}"
        )
    for name in sorted({"ms", "mj"} & row.keys()):
        values = row[name]
        if (
            not isinstance(values, list)
            or len(values) != len(row["order"])
            or not all(is_number(value) for value in values)
        ):
            raise ValueError(
                f"a round's {name} has one number of at least 0 for each of its bursts"
            )
    if 0 in row["ms"]:
        raise ValueError("no burst of a round took 0 ms")
    if not is_number(row["seconds"]):
        raise ValueError(f"a round's seconds are at least 0, not {row['seconds']!r}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < float("inf")


def run_rounds(
    timers: Sequence[Timer],
    reference: Timer,
    plan: Plan,
    journal: Journal,
    energy_mj: Callable[[], float] | None = None,
    tick: Callable[[int, int, int], None] = lambda round, done, total: None,
) -> tuple[list[Row], str]:
    """Time every operation once a round until all are precise, or the time or the rounds are up.

    Args:
        timers: one an operation.
        reference: of an operation that is always the same, timed every few bursts.
        journal: with rounds that were done before.
        energy_mj: reads a counter that only grows.
        tick: told the number of this round, and its bursts done and planned.

    Returns:
        The rounds, and why it ended: "precise", "rounds" or "time limit".
    """
    rows = journal.load(len(timers))[: plan.rounds]
    journal.start(rows)
    every = [*timers, reference]  # REFERENCE is its position
    calls: dict[int, int] = {}
    spent, began = rows[-1]["seconds"] if rows else 0.0, time.perf_counter()
    while True:
        active = unfinished(rows, len(timers), plan)
        seconds = spent + time.perf_counter() - began
        if not active:
            return rows, "precise"
        if len(rows) >= plan.rounds:
            return rows, "rounds"
        if rows and seconds >= plan.time_limit_s:
            return rows, "time limit"
        order = round_order(active, plan.seed, len(rows))
        row: Row = {"order": order, "ms": [], **({"mj": []} if energy_mj else {})}
        for which in order:
            if which not in calls:
                calls[which] = calls_per_burst(every[which], plan)
        for done, which in enumerate(order, start=1):
            if plan.burst_ms > 0:
                every[which](1)  # fetches what the burst before has pushed out of the caches
            before = energy_mj() if energy_mj else 0.0
            row["ms"].append(burst(every[which], calls[which]))
            if energy_mj:
                row["mj"].append((energy_mj() - before) / calls[which])
            tick(len(rows), done, len(order))
        row["seconds"] = round(spent + time.perf_counter() - began, 3)
        rows.append(row)
        journal.add(row)


def burst(timer: Timer, num_calls: int) -> float:
    """The mean ms of a call; tried again where the clock stood still or stepped back."""
    for _ in range(3):
        ms = timer(num_calls)
        if 0 < ms < float("inf"):
            return ms
    raise ValueError(f"a call took {ms} ms by the device's clock, three times in a row")


def calls_per_burst(timer: Timer, plan: Plan) -> int:
    """Warm up, then see how many calls make a burst of about `burst_ms`."""
    if plan.burst_ms == 0:
        return 1
    timer(plan.warmup)
    calls = 1
    while calls < MAX_CALLS:
        burst_ms = calls * min(timer(calls) for _ in range(3))  # one may have been interrupted
        if burst_ms >= plan.burst_ms / 2:
            break
        growth = plan.burst_ms / burst_ms if burst_ms > 0 else MAX_GROWTH
        calls = min(MAX_CALLS, max(calls + 1, round(calls * min(growth, MAX_GROWTH))))
    return calls


def round_order(operations: Sequence[int], seed: int, index: int) -> list[int]:
    """A new order every round, the reference every few bursts and at both ends; the same one when
    a round is repeated after an interruption."""
    shuffled = list(operations)
    random.Random(f"{seed} {index}").shuffle(shuffled)
    order = [REFERENCE]
    for start in range(0, len(shuffled), REFERENCE_EVERY):
        order += [*shuffled[start : start + REFERENCE_EVERY], REFERENCE]
    return order


def unfinished(rows: Sequence[Row], num_operations: int, plan: Plan) -> list[int]:
    """The operations whose median is not known well enough."""
    if len(rows) < plan.min_rounds:
        return list(range(num_operations))
    looked_at = max(plan.min_rounds, len(rows) - len(rows) % LOOK_EVERY)
    found = summarize(rows[:looked_at], num_operations)[:-1]
    return [i for i, s in enumerate(found) if s.ci_ms > plan.precision * s.median_ms]


def summarize(rows: Sequence[Row], num_operations: int) -> list[Statistics]:
    """Statistics by operation and, last, of the reference, from corrected times."""
    which = np.concatenate([row["order"] for row in rows]).astype(int) % (num_operations + 1)
    ms = corrected(np.concatenate([row["ms"] for row in rows]).astype(float), which)
    mj = np.concatenate([row.get("mj", []) for row in rows])
    return [
        statistics(ms[which == i], mj[which == i] if len(mj) == len(ms) else None)
        for i in range(num_operations + 1)
    ]


def halves(rows: Sequence[Row], num_operations: int) -> np.ndarray:
    """Medians of the even and of the odd rounds, from corrected times, shape (operations, 2)."""
    which = np.concatenate([row["order"] for row in rows]).astype(int) % (num_operations + 1)
    ms = corrected(np.concatenate([row["ms"] for row in rows]).astype(float), which)
    odd = np.repeat(np.arange(len(rows)), [len(row["order"]) for row in rows]) % 2
    parities = (0, 1) if len(rows) > 1 else (0, 0)
    mine = [which == i for i in range(num_operations)]
    return np.array([[np.median(ms[own & (odd == p)]) for p in parities] for own in mine])


def corrected(ms: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Times as if the device had always been as fast as in the middle of the whole measurement.

    A burst that took longer than its operation's median says that the device was slow just then;
    the median of what its neighbours in time say so (the reference is among them) divides it.

    Args:
        ms: bursts in order of time, shape (n,).
        which: operation of each, shape (n,).
    """
    speed = np.ones_like(ms)
    for _ in range(3):  # the medians themselves become better known
        medians = np.ones(which.max() + 1)
        for i in np.unique(which):
            medians[i] = np.median((ms / speed)[which == i])
        ratio = np.pad(ms / medians[which], NEIGHBOURS, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(ratio, 2 * NEIGHBOURS + 1).copy()
        windows[:, NEIGHBOURS] = np.nan  # a burst is no witness of its own
        speed = np.nanmedian(windows, axis=1) if len(ms) > 1 else speed
    return ms / speed


def statistics(ms: np.ndarray, mj: np.ndarray | None) -> Statistics:
    """Of one operation's bursts, both of shape (n,)."""
    values = np.sort(ms)
    low, median, high = np.percentile(values, (25, 50, 75))
    n = len(values)
    # Ranks n/2 -+ 0.98 sqrt(n) enclose the median with 95%: the binomial's normal form.
    first, last = math.floor(n / 2 - 0.98 * n**0.5), math.ceil(n / 2 + 0.98 * n**0.5)
    ci = (values[min(last, n - 1)] - values[max(first, 0)]) / 2 if n >= MIN_FOR_CI else median
    energy = None if mj is None else float(np.mean(mj))
    return Statistics(float(median), float(high - low), float(ci), n, energy)


def rapl(folder: str) -> Callable[[], float] | None:
    """A function that reads the mJ that all CPU packages have spent since now; None without one.

    It is the sum of `intel-rapl:N/energy_uj`, which root alone can read.
    """
    zones = sorted(glob.glob(os.path.join(folder, "intel-rapl:*")))
    zones = [zone for zone in zones if os.path.basename(zone).count(":") == 1]

    def read_file(zone: str, name: str) -> int:
        with open(os.path.join(zone, name), encoding="ascii") as file:
            return int(file.read())

    try:
        ranges = [read_file(zone, "max_energy_range_uj") for zone in zones]
        last = [read_file(zone, "energy_uj") for zone in zones]
    except (OSError, ValueError):
        return None
    if not zones:
        return None
    total = [0]

    def read() -> float:
        for index, zone in enumerate(zones):
            now = read_file(zone, "energy_uj")
            total[0] += (now - last[index]) % (ranges[index] + 1)  # the counter wraps around
            last[index] = now
        return total[0] / 1e3

    return read


def digest(value: Any) -> str:
    """Of a JSON value: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_lines(path: str, values: Sequence[Any]) -> None:
    """One JSON value a line, in place of what was there, at once."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


def session_timer(
    model: Any, inputs: dict[str, np.ndarray], threads: int, providers: Sequence[Any]
) -> Timer:
    """A timer of an ONNX model in onnxruntime.

    Args:
        model: a path, or the model's bytes.
        inputs: by name.
        threads: that compute one operator.
        providers: execution providers, in onnxruntime's form.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    taken = {
        node.name for node in session.get_inputs()
    }  # an input without effect is optimised away
    feeds = {name: value for name, value in inputs.items() if name in taken}

    def timer(num_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(num_calls):
            session.run(None, feeds)
        return (time.perf_counter() - start) / num_calls * 1e3

    return timer


def measure_bundle(folder: str, provider: str | None, skip_failing: bool) -> None:
    """Measure what the folder's manifest.json lists, and write its result.json.

    Args:
        provider: execution provider in place of the manifest's.
        skip_failing: measure the others where operations don't run.

    Raises:
        ValueError: files are damaged, operations don't run, or the clock cannot be used.
    """
    manifest = read_manifest(folder)
    path = os.path.join(folder, "result.json")
    with hold(folder):
        if os.path.exists(path):
            say(f"{path} is there already; to measure again, delete it", last=True)
            return
        if damaged := damaged_files(folder, manifest):
            listed = ", ".join(damaged)
            raise ValueError(f"files are missing or damaged, unpack the bundle again: {listed}")
        if provider is not None:
            manifest.update(provider=provider, provider_options={})
        result = measured(folder, manifest, skip_failing)
        write_lines(path, [{**result, "checksum": digest(result)}])
        os.remove(os.path.join(folder, "rounds.jsonl"))
    say(f"{len(result['rounds'])} rounds; the result is in {path}", last=True)


def measured(folder: str, manifest: dict[str, Any], skip_failing: bool) -> dict[str, Any]:
    """The content of result.json but for its checksum."""
    provider, options = manifest["provider"], manifest["provider_options"]
    device = describe(provider, options)
    timers, failed = load(folder, manifest, [(provider, options)])
    names = {f["name"] for f in failed}
    essential = {EMPTY, manifest["reference"]["name"]}
    if failed and (names & essential or not skip_failing):
        raise ValueError(f"{failing(failed)}\nto measure the others all the same: --skip-failing")
    operations = [
        {field: operation[field] for field in ("name", "where", "module")}
        for operation in manifest["operations"]
        if operation["name"] not in names
    ]
    header = {"bundle": manifest["id"], "device": device, "operations": operations}
    journal = Journal(os.path.join(folder, "rounds.jsonl"), header)
    rows = journal.load(len(operations))
    if journal.note:
        os.replace(str(journal.path), f"{journal.path}.old")
        journal.start(rows)
        say(f"going on from {len(rows)} rounds, others cannot be used: {journal.note}", last=True)
    reference = timers.pop(manifest["reference"]["name"])
    plan = Plan(**manifest["plan"])
    energy = rapl(RAPL) if provider == CPU else None
    rows, ended = run_rounds(
        list(timers.values()), reference, plan, journal, energy, tick=ticker(plan)
    )
    return {
        **RESULT, "bundle": manifest["id"], "target": manifest["target"], "device": device,
        "plan": manifest["plan"], "ended": ended, "operations": operations, "failed": failed,
        "rounds": rows,
    }  # fmt: skip


def read_manifest(folder: str) -> dict[str, Any]:
    with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
        manifest: dict[str, Any] = json.load(file)
    if manifest["id"] != digest({n: v for n, v in manifest.items() if n != "id"}):
        raise ValueError("manifest.json is damaged: unpack the bundle again")
    return manifest


def damaged_files(folder: str, manifest: dict[str, Any]) -> list[str]:
    """Those that are missing, or have another content than the manifest says."""
    damaged = []
    for name, expected in manifest["files"].items():
        try:
            with open(os.path.join(folder, name), "rb") as file:
                found = hashlib.sha256(file.read()).hexdigest()
        except FileNotFoundError:
            found = None
        if found != expected:
            damaged.append(name)
    return damaged


@contextlib.contextmanager
def hold(folder: str) -> Iterator[None]:
    """Wait until no other runner measures the bundle, and keep others waiting."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(os.path.join(folder, "runner.lock"), "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another runner measures this bundle; waiting for it to end", last=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(
    folder: str, manifest: dict[str, Any], providers: Sequence[Any]
) -> tuple[dict[str, Timer], list[dict[str, str]]]:
    """Timers by name, each called once; and the operations that don't run, with the reason."""
    timers: dict[str, Timer] = {}
    failed = []
    every = [*manifest["operations"], manifest["reference"]]
    for number, operation in enumerate(every, start=1):
        say(f"loading {number} of {len(every)}: {operation['where']}")
        rng = np.random.default_rng(0)
        inputs = {
            name: rng.standard_normal(shape, dtype=np.float32)
            for name, shape in operation["inputs"].items()
        }
        path, threads = os.path.join(folder, operation["file"]), manifest["target"]["threads"]
        try:
            timer = session_timer(path, inputs, threads, providers)
            timer(1)
        except Exception as error:  # runtimes raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failed.append({**{n: operation[n] for n in ("name", "where")}, "reason": reason})
        else:
            timers[operation["name"]] = timer
    return timers, failed


def failing(failed: Sequence[dict[str, str]]) -> str:
    """Names operations that don't run, and how to search without them."""
    lines = [f"\n  {f['where']} ({f['name']}): {f['reason']}" for f in failed]
    words = [word for f in failed for word in f["where"].split(", ") if "=" in word]
    text = f"{len(failed)} operations do not run on the device:{''.join(lines)}"
    if words:
        listed = json.dumps(list(dict.fromkeys(words)))
        text += f"\nto search without these candidates: 'exclude={listed}'"
    return text


def describe(provider: str, options: dict[str, Any]) -> dict[str, str]:
    """What timings on this device depend on besides the target.

    Raises:
        ValueError: onnxruntime or the execution provider is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{error}; python3 -m pip install onnxruntime") from None
    if provider not in (available := onnxruntime.get_available_providers()):
        raise ValueError(
            f"onnxruntime has no provider {provider!r} here; valid: {', '.join(available)}"
        )
    words = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
    return {
        "device_name": device_name(),
        "onnxruntime": onnxruntime.__version__,
        "provider": f"{provider} {words}".strip(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def device_name() -> str:
    """Board, CPU and number of cores, as far as the system tells them."""
    names = []
    for path, field in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = [line for line in file.read().split("\n") if line.startswith(field)]
            names += [line.split(":")[-1].strip(" \t\0") for line in lines[:1]]
    names += [platform.machine(), f"{os.cpu_count()} cores"]
    return ", ".join(name for name in names if name)


def ticker(plan: Plan) -> Callable[[int, int, int], None]:
    """Shows how far the measuring is, not more than once a second."""
    last = [-math.inf]

    def tick(index: int, done: int, total: int) -> None:
        if time.monotonic() - last[0] >= SHOW_EVERY_S:
            last[0] = time.monotonic()
            say(f"round {index + 1} of at most {plan.rounds}: {done} of {total} bursts")

    return tick


def say(text: str, last: bool = False) -> None:
    """A line; in a terminal the next one takes its place, unless it is the last."""
    if sys.stdout.isatty():
        text = f"\r\033[K{text if last else text[: os.get_terminal_size().columns - 1]}"
    end = "" if sys.stdout.isatty() and not last else "\n"
    print(text, end=end, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the ONNX files beside this program; started again, it goes on."
    )
    here = os.path.dirname(os.path.abspath(sys.argv[0]))
    parser.add_argument("--folder", default=here, help="of the bundle, this program's by default")
    parser.add_argument("--provider", help="execution provider instead of the bundle's")
    parser.add_argument(
        "--skip-failing", action="store_true", help="measure the others where operations don't run"
    )
    parser.add_argument("--describe", metavar="OPTIONS", help="print what the device is, and end")
    parser.add_argument(
        "--damaged", action="store_true", help="print missing and damaged files, and end"
    )
    args = parser.parse_args()
    try:
        if args.describe:
            print(json.dumps(describe(args.provider or CPU, json.loads(args.describe))))
        elif args.damaged:
            print(json.dumps(damaged_files(args.folder, read_manifest(args.folder))))
        else:
            measure_bundle(args.folder, args.provider, args.skip_failing)
    except (ValueError, OSError) as error:
        sys.exit(f"runner.py: {error}")


if __name__ == "__main__":
    main()
