"""The latency table: what was measured, for which target, and where it came from."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from supernet.files import read_json, write_json

FORMAT = "supernet.latency_table"
VERSION = 2
UNIT = "ms"

T = TypeVar("T", "OpKey", "Measurement", "Target", "Calibration")


@dataclass(frozen=True, order=True)
class OpKey:
    """What identifies a measurement within one target.

    Attributes:
        op: the operation with all its hyperparameters.
        in_chs: channels of its (first) input.
        out_chs: channels of its output.
        stride: side of its input over side of its output.
        resolution: side of its input, 1 for vectors.
    """

    op: str
    in_chs: int
    out_chs: int
    stride: int
    resolution: int

    def __post_init__(self) -> None:
        _check_text("op", self.op)
        for name in ("in_chs", "out_chs", "stride", "resolution"):
            _check_count(name, getattr(self, name))

    def __str__(self) -> str:
        return (
            f"{self.op} in_chs={self.in_chs} out_chs={self.out_chs} "
            f"stride={self.stride} resolution={self.resolution}"
        )


@dataclass(frozen=True)
class Measurement:
    """Time of one call.

    Attributes:
        median_ms: median over the runs; in a table, what the call itself takes and the operation's
            frame (`latency.framing`) are subtracted.
        iqr_ms: distance between the quartiles of the runs.
        ci_ms: half of the width of the median's 95% confidence interval.
        num_runs: number of bursts, one a round, each the mean of its calls.
        energy_mj: energy of one call in mJ; None where the device does not tell.
        precision: the confidence interval as a share of what was timed, frame included.
    """

    median_ms: float
    iqr_ms: float
    ci_ms: float
    num_runs: int
    energy_mj: float | None = None
    precision: float = 0.0

    def __post_init__(self) -> None:
        for name in ("median_ms", "iqr_ms", "ci_ms", "precision"):
            check_number(name, getattr(self, name))
        _check_count("num_runs", self.num_runs)
        if self.energy_mj is not None:
            check_number("energy_mj", self.energy_mj)

    def without(self, base: Measurement) -> Measurement:
        """What is left of an operation without what it stood in; not less than nothing."""
        energy = None
        if self.energy_mj is not None and base.energy_mj is not None:
            energy = max(0.0, self.energy_mj - base.energy_mj)
        return replace(
            self,
            median_ms=max(0.0, self.median_ms - base.median_ms),
            ci_ms=math.hypot(self.ci_ms, base.ci_ms),
            energy_mj=energy,
        )

    @classmethod
    def mean(cls, several: Sequence[Measurement]) -> Measurement:
        """Of independent measurements of the same."""
        energies = [m.energy_mj for m in several if m.energy_mj is not None]
        median_ms = statistics.mean(m.median_ms for m in several)
        ci_ms = math.hypot(*(m.ci_ms for m in several)) / len(several)
        return cls(
            median_ms=median_ms,
            iqr_ms=statistics.mean(m.iqr_ms for m in several),
            ci_ms=ci_ms,
            num_runs=sum(m.num_runs for m in several),
            energy_mj=statistics.mean(energies) if len(energies) == len(several) else None,
            precision=ci_ms / median_ms if median_ms else 0.0,
        )

    def scaled(self, factor: float) -> Measurement:
        """The times multiplied."""
        times = {n: factor * getattr(self, n) for n in ("median_ms", "iqr_ms", "ci_ms")}
        return replace(self, **times)


@dataclass(frozen=True)
class Calibration:
    """From the sum over operations to the latency of a whole network.

    latency = call_ms + op_ms * (number of operations) + scale * (sum of medians)
              + weight_ms * (millions of parameters)

    An operation that is not repeated finds its code cold, which costs about the same for all; the
    last term is the time to fetch weights that other layers have pushed out of the cache. No
    coefficient but `call_ms` is negative, so the latency never falls when an operation is added.

    Attributes:
        space, settings: of the networks it was fitted on, as in `Architecture`.
        call_ms, op_ms, scale, weight_ms: the coefficients; the first one is fitted where the
            runtime compiles graphs, the second one where it does not.
        num_networks: fitted on.
        report: what was found on other networks (`latency.calibration.Report`), JSON values.
        anchors: the networks it was fitted on, {"architecture": {choice: option}, "ms": ms} each,
            the fastest first: measured again they tell how fast the device is.
    """

    space: str
    settings: str
    call_ms: float
    scale: float
    weight_ms: float
    num_networks: int
    report: dict[str, Any]
    anchors: list[dict[str, Any]] = field(default_factory=list)
    op_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_text("space", self.space)
        _check_text("settings", self.settings)
        check_number("call_ms", self.call_ms, negative=True)
        for name in ("op_ms", "scale", "weight_ms"):
            check_number(name, getattr(self, name))
        _check_count("num_networks", self.num_networks)
        if not isinstance(self.report, dict):
            raise ValueError(f"report must be an object, not {self.report!r}")
        if not isinstance(self.anchors, list):
            raise ValueError(f"anchors must be a list, not {self.anchors!r}")
        for anchor in self.anchors:
            _check_names(anchor, {"architecture", "ms"}, "an anchor")
            check_number("ms", anchor["ms"])


@dataclass(frozen=True)
class Target:
    """Where the network will run; separate from where and how it is trained.

    Attributes:
        device: as the backend names it ("cpu", "cuda"), or any name of a device whose
            table was measured elsewhere.
        runtime: what executes the network there: "torch" (PyTorch in eager mode), "onnxruntime"
            or any other name.
        threads: CPU threads.
        batch: images a call.
        dtype: of weights and activations; int8 is the runtime's own quantisation.
        resolution: side of the (square) input image.
    """

    device: str = "cpu"
    runtime: str = "torch"
    threads: int = 1
    batch: int = 1
    dtype: str = "float32"
    resolution: int = 224

    def __post_init__(self) -> None:
        for name in ("device", "runtime", "dtype"):
            _check_text(name, getattr(self, name))
        for name in ("threads", "batch", "resolution"):
            _check_count(name, getattr(self, name))


@dataclass
class LatencyTable:
    """Measurements of one target.

    Attributes:
        target: what they were measured for.
        provenance: JSON values: name of the device, versions, date, rounds.
        overhead_ms: what a call takes that computes nothing.
        reference_ms: what the reference operation took: how fast the device was.
        measurements: by operation.
        calibrations: one a space that was validated.
    """

    target: Target
    provenance: dict[str, Any]
    overhead_ms: float
    reference_ms: float
    measurements: dict[OpKey, Measurement]
    calibrations: list[Calibration] = field(default_factory=list)

    def calibration(self, space: str, settings: str) -> Calibration | None:
        """The one of a space, if it was validated."""
        found = [c for c in self.calibrations if (c.space, c.settings) == (space, settings)]
        return found[0] if found else None

    def calibrate(self, calibration: Calibration) -> None:
        """Put it in the place of the same space's."""
        others = [
            c
            for c in self.calibrations
            if (c.space, c.settings) != (calibration.space, calibration.settings)
        ]
        self.calibrations = [*others, calibration]

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Both tables in one; where both measured an operation, the other's is taken.

        The other's times are brought to this table's speed by the reference.

        Raises:
            ValueError: measured for another target or on another device.
        """
        self.check_target(other.target)
        names = [table.provenance.get("device_name") for table in (self, other)]
        if names[0] != names[1]:
            raise ValueError(
                f"tables of different devices cannot be merged: {names[0]!r} and {names[1]!r}"
            )
        factor = self.reference_ms / other.reference_ms
        moved = {key: m.scaled(factor) for key, m in other.measurements.items()}
        merged = replace(self, measurements={**self.measurements, **moved})
        for calibration in other.calibrations:
            merged.calibrate(
                replace(
                    calibration,
                    call_ms=factor * calibration.call_ms,
                    op_ms=factor * calibration.op_ms,
                    weight_ms=factor * calibration.weight_ms,
                    anchors=[{**a, "ms": factor * a["ms"]} for a in calibration.anchors],
                )
            )
        return merged

    def missing(self, keys: Iterable[OpKey]) -> list[OpKey]:
        """The distinct keys without a measurement, sorted."""
        return sorted({key for key in keys if key not in self.measurements})

    def require(self, keys: Iterable[OpKey], command: str) -> None:
        """Check that every key was measured.

        Args:
            keys: needed.
            command: measures them, for the error.

        Raises:
            ValueError: lists every missing key, and the command.
        """
        if missing := self.missing(keys):
            lines = "\n".join(f"  {key}" for key in missing)
            raise ValueError(
                f"the latency table has no measurement of {len(missing)} operations:\n{lines}\n"
                f"measure them with: {command}"
            )

    def check_target(self, target: Target, device_name: str | None = None) -> None:
        """Refuse to stand for another target.

        Args:
            target: the one that is asked for.
            device_name: of this machine's device, as `Backend.describe()["device_name"]` has it,
                where the target is this machine; None accepts a table from any machine.

        Raises:
            ValueError: lists the fields that differ and says how to use the table regardless.
        """
        measured, asked = asdict(self.target), asdict(target)
        if device_name is not None:
            measured["device_name"] = self.provenance.get("device_name")
            asked["device_name"] = device_name
        if differ := [name for name in asked if measured[name] != asked[name]]:
            listed = ", ".join(f"{n}={measured[n]!r} instead of {asked[n]!r}" for n in differ)
            raise ValueError(
                f"the latency table was measured for another target: {listed}; measure this "
                "target, or set latency.allow_other_target=true to use the table regardless"
            )

    def restrict(self, keys: Iterable[OpKey]) -> LatencyTable:
        """The part of the table that covers `keys`, all of which it has."""
        part = {key: self.measurements[key] for key in sorted(set(keys))}
        return replace(self, measurements=part)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "unit": UNIT,
            "target": asdict(self.target),
            "provenance": self.provenance,
            "overhead_ms": self.overhead_ms,
            "reference_ms": self.reference_ms,
            "calibrations": [asdict(calibration) for calibration in self.calibrations],
            "measurements": [
                {**asdict(key), **asdict(measurement)}
                for key, measurement in sorted(self.measurements.items())
            ],
        }

    @classmethod
    def from_dict(cls, value: Any) -> LatencyTable:
        """Read the dictionary form.

        Raises:
            ValueError: not a table, another format version or unit, fields that are missing,
                unknown or of the wrong type, numbers that are negative or not finite, or an
                operation listed twice.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise ValueError(f'not a latency table: the field "format" must be "{FORMAT}"')
        if value.get("version") != VERSION:
            raise ValueError(
                f"latency table format version {value.get('version')!r} is not supported; "
                f"this package reads version {VERSION}"
            )
        names = {
            "format", "version", "unit", "target", "provenance", "overhead_ms", "reference_ms",
            "calibrations", "measurements",
        }  # fmt: skip
        _check_names(value, names, "a latency table")
        if value["unit"] != UNIT:
            raise ValueError(f'the unit of a latency table is "{UNIT}", not {value["unit"]!r}')
        if not isinstance(value["provenance"], dict):
            raise ValueError('latency table field "provenance" must be an object')
        for name in ("measurements", "calibrations"):
            if not isinstance(value[name], list):
                raise ValueError(f'latency table field "{name}" must be a list')
        for name in ("overhead_ms", "reference_ms"):
            check_number(name, value[name])
        measurements: dict[OpKey, Measurement] = {}
        for index, row in enumerate(value["measurements"]):
            try:
                key, measurement = _read_row(row)
            except ValueError as error:
                raise ValueError(f"measurement {index}: {error}") from None
            if key in measurements:
                raise ValueError(f"measurement {index}: listed twice: {key}")
            measurements[key] = measurement
        return cls(
            _read(Target, value["target"], "a target"),
            value["provenance"],
            value["overhead_ms"],
            value["reference_ms"],
            measurements,
            [_read(Calibration, row, "a calibration") for row in value["calibrations"]],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table.

        Raises:
            ValueError: as `from_dict`, or a missing or truncated file; the message names the path.
        """
        value = read_json(path, "latency table")
        try:
            return cls.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None


def check_number(name: str, value: Any, negative: bool = False) -> None:
    """Check that a quantity read or measured is a finite number, and not `negative` unless it may.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    least = -sys.float_info.max if negative else 0
    if not number or not least <= value <= sys.float_info.max:
        which = "" if negative else " of at least 0"
        raise ValueError(f"{name} must be a finite number{which}, not {value!r}")


def _read_row(row: Any) -> tuple[OpKey, Measurement]:
    key_names = {field.name for field in fields(OpKey)}
    _check_names(row, key_names | {field.name for field in fields(Measurement)}, "a measurement")
    key = {name: value for name, value in row.items() if name in key_names}
    rest = {name: value for name, value in row.items() if name not in key_names}
    return _read(OpKey, key, "a key"), _read(Measurement, rest, "a measurement")


def _read(cls: type[T], value: Any, what: str) -> T:
    _check_names(value, {field.name for field in fields(cls)}, what)
    return cls(**value)


def _check_names(value: Any, names: set[str], what: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object, not {value!r}")
    if missing := sorted(names - set(value)):
        raise ValueError(f"{what} lacks the field {', '.join(map(repr, missing))}")
    if unknown := sorted(set(value) - names):
        raise ValueError(f"{what} has no field {', '.join(map(repr, unknown))}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text, not {value!r}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
