"""The files of a run folder, read for the report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from latency.table import Calibration, LatencyTable
from supernet.choice import Architecture
from supernet.files import read_json
from supernet.space import SearchSpace
from supernet.tracking import read_journal

Record = Mapping[str, Any]


class Run:
    """The files of a run folder; what a run did not write is None or empty.

    Args:
        folder: of a search (whose retraining is in `retrain/`), or of a retraining of its own.

    Raises:
        ValueError: the folder holds neither metrics nor a result, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.metrics = read_journal(self.folder / "metrics.jsonl")
        self.timing = read_journal(self.folder / "timing.jsonl")
        result = self._json("result.json")
        inner = self._json("retrain/result.json")
        alone = result is not None and "networks" in result
        self.result = None if alone else result
        self.retraining = result if alone else inner
        self._retrain_folder = self.folder if alone else self.folder / "retrain"
        if result is None and inner is None and not self.metrics:
            raise ValueError(
                f"{self.folder} is no run folder: it has neither metrics.jsonl nor result.json"
            )
        config = self.folder / "config.yaml"
        self.config = config.read_text(encoding="utf-8") if config.exists() else ""
        table = self.folder / "latency_table.json"
        self.table = LatencyTable.load(table) if table.exists() else None
        path = self.folder / "architecture.json"
        self.architecture = Architecture.load(path) if path.exists() else None

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_json(path, "result") if path.exists() else None

    @property
    def calibration(self) -> Calibration | None:
        """Of the latency table, for the run's space."""
        if self.table is None or self.space is None:
            return None
        return self.table.calibration(self.space.id, self.space.settings)

    @cached_property
    def space(self) -> SearchSpace | None:
        return None if self.architecture is None else SearchSpace.of(self.architecture)

    @property
    def epochs(self) -> list[Record]:
        return [r for r in self.metrics if r["phase"] in ("warmup", "search")]

    @property
    def collapse(self) -> list[Record]:
        """What the monitor of collapse had to say."""
        return [r for r in self.metrics if r["phase"] == "monitor"]

    @property
    def ranked(self) -> list[Record]:
        return [r for r in self.metrics if r["phase"] == "rank" and r.get("accuracy") is not None]

    @property
    def tries(self) -> bool:
        """Whether the search tried architectures one by one, and timed each."""
        timed = {line["step"] for line in self.timing}
        return bool(self.ranked) and all("judge" in r and r["step"] in timed for r in self.ranked)

    @property
    def budget(self) -> float | None:
        source = self.result or self.retraining or {}
        return source.get("budget")

    @property
    def cost(self) -> tuple[str, str]:
        """Name and unit of what the budget limits."""
        cost = (self.result or {}).get("cost", {"name": "latency", "unit": "ms"})
        return cost["name"], cost["unit"]

    @property
    def networks(self) -> list[Record]:
        return self.retraining["networks"] if self.retraining else []

    @cached_property
    def curves(self) -> dict[str, list[Record]]:
        """Epoch lines by network, with the better accuracy of plain and averaged weights."""
        curves: dict[str, list[Record]] = {}
        for network in self.networks:
            lines = read_journal(self._retrain_folder / network["name"] / "metrics.jsonl")
            if lines:
                curves[network["name"]] = [
                    {**line, "val_accuracy": max(line["val_accuracy"] or 0.0,
                                                 line.get("ema_val_accuracy") or 0.0)}
                    for line in lines
                ]  # fmt: skip
        return curves
