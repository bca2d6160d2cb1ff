"""Measure the operations of a space, and whole networks, on a target."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
from torch import nn

from latency.backends.base import Backend
from latency.cache import cache_folder, machine_lock
from latency.framing import can_frame, frame_of, framed
from latency.runner import Plan
from latency.samples import EMPTY, Operation, Samples
from latency.sites import Site
from latency.table import LatencyTable, Measurement, OpKey, Target
from supernet.choice import canonical_json

log = logging.getLogger(__name__)

METHOD = 2  # of measuring; a cache of another one is not used
SLOWER = 1.1  # times the table's speed: worth telling


def measure(
    sites: Iterable[Site],
    backend: Backend,
    target: Target,
    plan: Plan,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LatencyTable:
    """Measure every distinct operation of `sites`.

    Args:
        sites: traced with the target's batch and resolution.
        backend: of the target's runtime and device.
        target: accepted by the backend.
        plan: how much is measured.
        journal: keeps the finished rounds, so that a call after a kill goes on from them; deleted
            at the end.
        progress: show a bar where the output is a terminal.

    Raises:
        ValueError: the backend cannot measure the target or an operation, or the sites were traced
            with another batch.
        Elsewhere: the device is out of reach; the message says what to do.
    """
    backend.check(target)
    work = work_of(sites, backend, target)
    path = None if journal is None else Path(journal)
    with machine_lock():
        samples = backend.sample(work.operations, target, plan, path, progress)
    return table_of(samples, work, target)


@dataclass(frozen=True)
class MeasuredNetwork:
    """A whole network's latency.

    Attributes:
        measurement: at the speed that the device had when the table was measured.
        halves: medians of the even and of the odd rounds, in ms.
        speed: what the anchors (or the reference) took for the table over what they take now; 1
            without a table.
    """

    measurement: Measurement
    halves: tuple[float, float]
    speed: float


def measure_networks(
    networks: Sequence[nn.Module],
    backend: Backend,
    target: Target,
    plan: Plan,
    *,
    in_chans: int,
    reference_ms: float | None = None,
    anchors: Sequence[tuple[nn.Module, float]] = (),
    copies: int = 1,
    progress: bool = True,
) -> list[MeasuredNetwork]:
    """Measure whole networks, interleaved; each is called with one image batch of the target.

    Args:
        networks: called as `network(x)`.
        in_chans: channels of the image.
        reference_ms: of the latency table they are compared with: times are brought to its speed,
            since a device runs faster in one hour than in another.
        anchors: networks with the ms they took when the table was made. Measured in the same
            rounds they tell the speed better than the small reference does.
        copies: how often each network is loaded, to be timed as if it were several, whose mean is
            given: where a network lands in memory moves its time by a percent or two.

    Other arguments and errors: as `measure`.
    """
    backend.check(target)
    loaded = [network for network in networks for _ in range(copies)]
    every = [*loaded, *(network for network, _ in anchors)]
    operations = network_operations(every, target, in_chans)
    with machine_lock():
        samples = backend.sample(operations, target, plan, None, progress)
    names = list(operations)
    before = [ms for _, ms in anchors]
    now = [samples.measurement(name).median_ms for name in names[len(loaded) :]]
    if reference_ms is not None and not anchors:
        before, now = [reference_ms], [samples.reference_ms]
    speed = statistics.median(b / n for b, n in zip(before, now, strict=True)) if before else 1.0
    found = networks_of(samples, names[: len(loaded)], speed)
    return [_mean(found[i : i + copies]) for i in range(0, len(found), copies)]


def _mean(copies: Sequence[MeasuredNetwork]) -> MeasuredNetwork:
    """Of one network, loaded several times."""
    measurement = Measurement.mean([copy.measurement for copy in copies])
    first, second = zip(*(copy.halves for copy in copies), strict=True)
    halves = statistics.mean(first), statistics.mean(second)
    return MeasuredNetwork(measurement, halves, copies[0].speed)


def network_operations(
    networks: Sequence[nn.Module], target: Target, in_chans: int
) -> dict[str, Operation]:
    shape = (target.batch, in_chans, target.resolution, target.resolution)
    return {
        f"network {index}": Operation(network, (shape,), f"network {index}")
        for index, network in enumerate(networks)
    }


def networks_of(
    samples: Samples, names: Sequence[str], speed: float = 1.0
) -> list[MeasuredNetwork]:
    """The networks among the samples, at the table's speed."""
    if not 1 / SLOWER < speed < SLOWER:
        log.warning(
            "the device is %.2f times as fast as when the first latencies were measured; those of "
            "whole networks are given at the speed that it had then",
            speed,
        )
    found = []
    for name in names:
        first, second = samples.halves(name)
        measurement = samples.measurement(name).scaled(speed)
        found.append(MeasuredNetwork(measurement, (speed * first, speed * second), speed))
    return found


def cached_table(
    sites: Sequence[Site],
    backend: Backend,
    target: Target,
    plan: Plan,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[LatencyTable, Path, bool]:
    """The table of `sites`, measuring only what was not measured before on the same device.

    One file serves every space on the same device, target and versions. What was measured with a
    wider confidence interval than `plan` asks for, in fewer rounds, is measured again. Jobs that
    ask at the same time wait for the first one.

    Args:
        cache_dir: `latency.cache.cache_folder()` by default.

    Other arguments and errors: as `measure`.

    Returns:
        The table of exactly these sites, the file that keeps it among others, and whether
        anything was measured now.
    """
    backend.check(target)
    path = cache_path(backend, target, cache_dir)
    with machine_lock():
        table = load_cache(path)
        known = {} if table is None else table.measurements
        missing = [site for site in sites if not _suffices(known.get(site.key), plan)]
        if missing:
            work = work_of(missing, backend, target)
            journal = path.with_name(f"{path.stem}-{_digest(list(work.operations))}.rounds.jsonl")
            new = table_of(
                backend.sample(work.operations, target, plan, journal, progress), work, target
            )
            table = new if table is None else table.merge(new)
            table.save(path)
    assert table is not None
    return table.restrict(site.key for site in sites), path, bool(missing)


def _suffices(measurement: Measurement | None, plan: Plan) -> bool:
    if measurement is None:
        return False
    return measurement.precision <= plan.precision or measurement.num_runs >= plan.rounds


@dataclass(frozen=True)
class Work:
    """What is timed to learn what operations take.

    Attributes:
        operations: by name, frames included (`latency.framing`).
        names: for each key the names of what is timed: first the operation, then what is subtracted
            from it (its frame, or an empty call), then pairs of which the first is added and the
            second subtracted (closings).
        compiled: whether the runtime compiles graphs.
    """

    operations: dict[str, Operation]
    names: dict[OpKey, tuple[str, ...]]
    compiled: bool


def work_of(sites: Iterable[Site], backend: Backend, target: Target) -> Work:
    """Every distinct operation once, with the names of the candidates that need it."""
    first: dict[OpKey, Site] = {}
    where: dict[OpKey, list[str]] = {}
    for site in sites:
        first.setdefault(site.key, site)
        name = f"{site.choice}={site.option}" if site.choice else "a fixed layer"
        where.setdefault(site.key, []).append(name)
    batches = sorted({site.input_shapes[0][0] for site in first.values()})
    if target.batch not in batches:
        raise ValueError(
            f"the operations were traced with a batch of {', '.join(map(str, batches))}, but "
            f"the target's batch is {target.batch}; trace them with the target's"
        )
    work = Work({}, {}, backend.framed)
    for key, site in first.items():
        places = ", ".join(dict.fromkeys(where[key]))
        operation = Operation(site.module, site.input_shapes, places)
        timed = [EMPTY]
        if backend.framed and can_frame(site.input_shapes, site.output_shape):
            shapes = site.input_shapes
            frames = [frame_of(shapes)]
            for shape in shapes[1:]:
                frames += [frame_of([shape], closings=2), frame_of([shape])]
            work.operations.update(frames)
            timed = [name for name, _ in frames]
            operation = framed(operation)
        work.operations[str(key)] = operation
        work.names[key] = (str(key), *timed)
    return work


def table_of(samples: Samples, work: Work, target: Target) -> LatencyTable:
    """The table of the operations among the samples, frames and empty calls taken out."""
    provenance: dict[str, Any] = {
        **samples.device,
        "timm": timm.__version__,
        **samples.plan,
        "ended": samples.ended,
        "compiled": work.compiled,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if samples.ended != "precise":
        share = samples.plan["precision"]
        found = [samples.measurement(names[0]) for names in work.names.values()]
        wide = sum(m.ci_ms > share * m.median_ms for m in found)
        log.info(
            "measuring ended by its %s: %d of %d operations have a 95%% confidence interval wider "
            "than +-%.1f%% of their median",
            samples.ended, wide, len(found), 100 * share,
        )  # fmt: skip
    measurements = {}
    for key, names in work.names.items():
        operation, base, *closings = (samples.measurement(name) for name in names)
        for twice, once in zip(closings[::2], closings[1::2], strict=True):
            base = base.without(twice.without(once))
        measurements[key] = operation.without(base)
    return LatencyTable(target, provenance, samples.overhead_ms, samples.reference_ms, measurements)


def cache_path(
    backend: Backend, target: Target, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Readable in front, and a digest of everything that a timing depends on."""
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    digest = _digest([asdict(target), {**backend.describe(), "timm": timm.__version__}, METHOD])
    words = f"{target.device}-{target.runtime}-{target.dtype}-b{target.batch}-r{target.resolution}"
    return folder / f"{re.sub('[^A-Za-z0-9-]+', '_', words)}-{digest}.json"


def load_cache(path: Path) -> LatencyTable | None:
    """What was measured before; None where there is nothing that can be used."""
    if not path.exists():
        return None
    try:
        return LatencyTable.load(path)
    except ValueError as error:
        log.warning("a cached latency table cannot be used, it is measured anew: %s", error)
        return None


def keep(path: Path, table: LatencyTable) -> None:
    """Add a table's measurements and calibrations to the cache."""
    with machine_lock():
        kept = load_cache(path)
        (table if kept is None else kept.merge(table)).save(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]
