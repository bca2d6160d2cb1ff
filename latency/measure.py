"""Measure operations and whole networks on a target."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
from torch import nn

from latency.backends.base import Backend
from latency.cache import cache_folder, machine_lock
from latency.sampling import Operation, Plan, Progress, sample
from latency.sites import Site
from latency.table import LatencyTable, Measurement, OpKey, Target
from supernet.choice import canonical_json

log = logging.getLogger(__name__)

ROUNDS, WARMUP, BURST_MS = 20, 3, 5.0


def measure(
    sites: Iterable[Site],
    backend: Backend,
    target: Target,
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    burst_ms: float = BURST_MS,
    seed: int = 0,
    progress_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LatencyTable:
    """Measure every distinct operation of `sites`.

    Args:
        sites: traced with the target's batch and resolution.
        backend: what runs them on this machine.
        target: accepted by the backend.
        rounds: bursts an operation; medians and quartiles are taken over them.
        warmup: calls before an operation's first burst.
        burst_ms: about how long a burst lasts; at least one call.
        seed: of the order within the rounds.
        progress_path: keeps the finished rounds, so that a call after a kill goes on from them;
            deleted at the end.
        progress: show a bar where the output is a terminal.

    Raises:
        ValueError: a setting is out of range, the backend cannot measure the target, or the sites
            were traced with another batch.
    """
    plan = Plan(rounds, warmup, burst_ms, seed)
    backend.check(target)
    operations = _operations(sites, target)
    state = _progress(progress_path, operations, backend, target)
    with machine_lock():
        table = _measure(operations, backend, target, plan, state, progress)
    state.delete()
    return table


def measure_networks(
    networks: Sequence[nn.Module],
    backend: Backend,
    target: Target,
    *,
    in_chans: int,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    burst_ms: float = BURST_MS,
    seed: int = 0,
    progress: bool = True,
) -> list[Measurement]:
    """Measure whole networks, interleaved; each is called with one image batch of the target.

    Args:
        networks: called as `network(x)`.
        in_chans: channels of the image.

    Other arguments and errors: as `measure`.
    """
    plan = Plan(rounds, warmup, burst_ms, seed)
    backend.check(target)
    shape = (target.batch, in_chans, target.resolution, target.resolution)
    names = [str(index) for index in range(len(networks))]
    with machine_lock():
        return sample(
            [(network, (shape,)) for network in networks],
            backend,
            target,
            plan,
            Progress(None, names, backend, target),
            progress,
        )


def measure_network(
    network: nn.Module,
    backend: Backend,
    target: Target,
    *,
    in_chans: int,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    burst_ms: float = BURST_MS,
    progress: bool = True,
) -> Measurement:
    """Measure one whole network, as `measure_networks`."""
    return measure_networks(
        [network],
        backend,
        target,
        in_chans=in_chans,
        rounds=rounds,
        warmup=warmup,
        burst_ms=burst_ms,
        progress=progress,
    )[0]


def cached_table(
    sites: Sequence[Site],
    backend: Backend,
    target: Target,
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    burst_ms: float = BURST_MS,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[LatencyTable, Path, bool]:
    """The table of `sites`, measuring only what this machine has not measured before.

    One file serves every space on the same device, target and versions. What was measured in fewer
    rounds is measured again. Jobs that ask at the same time wait for the first one.

    Args:
        cache_dir: `latency.cache.cache_folder()` by default.

    Other arguments and errors: as `measure`.

    Returns:
        The table of exactly these sites, the file that keeps it among others, and whether
        anything was measured now.
    """
    plan = Plan(rounds, warmup, burst_ms, seed)
    backend.check(target)
    operations = _operations(sites, target)
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    path = folder / _file_name(backend, target)
    with machine_lock():
        table = _load_cache(path, target)
        missing = {
            key: operation
            for key, operation in operations.items()
            if key not in table.measurements or table.measurements[key].num_runs < rounds
        }
        if missing:
            name = f"{path.stem}-{_digest([str(key) for key in missing])}.progress.json"
            state = _progress(folder / name, missing, backend, target)
            new = _measure(missing, backend, target, plan, state, progress)
            table = LatencyTable(target, new.provenance, table.measurements | new.measurements)
            table.save(path)
            state.delete()
    return table.restrict(operations), path, bool(missing)


def _operations(sites: Iterable[Site], target: Target) -> dict[OpKey, Operation]:
    """The distinct operations, each at the first site that has it."""
    operations: dict[OpKey, Operation] = {}
    for site in sites:
        operations.setdefault(site.key, (site.module, site.input_shapes))
    batches = sorted({shapes[0][0] for _, shapes in operations.values()})
    if target.batch not in batches:
        raise ValueError(
            f"the operations were traced with a batch of {', '.join(map(str, batches))}, but "
            f"the target's batch is {target.batch}; trace them with the target's"
        )
    return operations


def _progress(
    path: str | os.PathLike[str] | None,
    operations: Mapping[OpKey, Operation],
    backend: Backend,
    target: Target,
) -> Progress:
    names = [str(key) for key in operations]
    return Progress(None if path is None else Path(path), names, backend, target)


def _measure(
    operations: Mapping[OpKey, Operation],
    backend: Backend,
    target: Target,
    plan: Plan,
    state: Progress,
    show: bool,
) -> LatencyTable:
    measurements = sample(list(operations.values()), backend, target, plan, state, show)
    provenance: dict[str, Any] = {
        **_versions(backend),
        **asdict(plan),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return LatencyTable(target, provenance, dict(zip(operations, measurements, strict=True)))


def _versions(backend: Backend) -> dict[str, str]:
    return {**backend.describe(), "timm": timm.__version__}


def _file_name(backend: Backend, target: Target) -> str:
    """Readable in front, and a digest of everything that a timing depends on."""
    digest = _digest([asdict(target), _versions(backend)])
    words = f"{target.device}-{target.runtime}-{target.dtype}-b{target.batch}-r{target.resolution}"
    return f"{re.sub('[^A-Za-z0-9-]+', '_', words)}-{digest}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def _load_cache(path: Path, target: Target) -> LatencyTable:
    empty = LatencyTable(target, {}, {})
    if not path.exists():
        return empty
    try:
        return LatencyTable.load(path)
    except ValueError as error:
        log.warning("a cached latency table cannot be used, it is measured anew: %s", error)
        return empty
