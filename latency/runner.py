#!/usr/bin/env python3
"""How latencies are measured: bursts in rounds, beside a reference. Also the program of a bundle.

Unpacked on a device, `python3 runner.py` measures the ONNX files beside it and writes result.json;
started again after an interruption it goes on. This file alone runs there: it needs Python 3.8,
numpy and onnxruntime, and nothing else of its package.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Sequence

import numpy as np

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
