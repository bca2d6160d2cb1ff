"""What the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from supernet_scripts import common


@pytest.mark.parametrize(
    "backend,keeps", [({}, True), ({"keep_memory": True}, True), ({"keep_memory": False}, False)]
)
def test_training_keeps_memory_unless_faults_are_to_be_measured(
    backend: dict[str, bool], keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, threads = list[str](), torch.get_num_threads()
    monkeypatch.setattr(common, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: calls.append(f"{number} threads"))
    common.set_up_cpu(OmegaConf.create({"num_threads": 3, "backend": backend}))
    assert calls == ["3 threads", *(["kept"] if keeps else [])]
    common.set_up_cpu(OmegaConf.create({"num_threads": None}))
    assert calls[-1] == "kept" and torch.get_num_threads() == threads


def test_a_run_may_be_resumed_with_another_benchmark(tmp_path: Path) -> None:
    """Also one of before, whose configuration was kept with it."""
    ours = OmegaConf.create({"seed": 1, "resume": True, "benchmark": {"table": "a", "column": "b"}})
    (tmp_path / "checkpoint").mkdir()
    for kept in ("seed: 1\n", "seed: 1\nbenchmark: {table: a, column: tset}\n"):
        (tmp_path / "config.yaml").write_text(kept)
        common._check_folder(ours, tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 2\n")
    with pytest.raises(ValueError, match=r"different: seed=1 \(was 2\)$"):
        common._check_folder(ours, tmp_path)
