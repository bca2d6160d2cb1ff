from __future__ import annotations

import json
from pathlib import Path

import pytest

from supernet.report.edf import edf, read_values, write_edf


def make_run(folder: Path, accuracies: list[float], seed: int, space: str) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    text = f"- space={space}\n- seed={seed}\n- run_dir={folder}\n"
    (folder / ".hydra" / "overrides.yaml").write_text(text)
    records = [
        {"phase": "rank", "judge": "x", "unit": "%", "accuracy": a, "costs": {"macs": 2 * a}}
        for a in accuracies
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_the_share_of_values_below() -> None:
    assert edf([3, 1, 2, 2], [0, 1, 1.5, 2, 2.5, 3, 4]) == [0, 0, 0.25, 0.25, 0.75, 0.75, 1]


def test_samples_of_a_space_are_put_together(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", [90, 80], 0, "wide"),
        make_run(tmp_path / "b", [70], 1, "wide"),
        make_run(tmp_path / "c", [60, 50, 40], 0, "narrow"),
    ]
    page, rows = write_edf(runs, "error", tmp_path / "out")
    assert [(r["name"], r["n"]) for r in rows] == [("space=wide", 3), ("space=narrow", 3)]
    assert rows[0]["values"] == [10, 20, 30] and rows[1]["quartiles"] == [45, 50, 55]
    assert page.name == "edf_error.html" and "<svg" in page.read_text()
    _, rows = write_edf(runs, "macs", tmp_path / "out")
    assert rows[1]["values"] == [80, 100, 120]


def test_what_the_records_do_not_have_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [90], 0, "wide")
    with pytest.raises(ValueError, match="edf='latency' is not in the records .*: error, macs"):
        read_values(run, "latency")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="judged no architectures one by one"):
        read_values(run, "error")


def test_cells_with_too_few_blocks_are_not_of_the_space(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [90, 80], 0, "pnas")
    part = {"phase": "part", "judge": "x", "unit": "%", "accuracy": 20}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(part) + "\n")
    assert read_values(run, "error") == [10, 20] and read_values(run, "macs") == [180, 160]


def test_scores_have_no_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [900], 0, "wide")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"%"', '""'))
    with pytest.raises(ValueError, match="judged by x, which is no accuracy and has no error"):
        read_values(run, "error")
    assert read_values(run, "macs") == [1800]
