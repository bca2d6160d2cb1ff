from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supernet.report.progress import group, read_courses, summarise, write_progress


def make_run(folder: Path, accuracies: list[float], pace: float, **given: Any) -> Path:
    """A search that judged architectures of these accuracies, one every `pace` seconds."""
    (folder / ".hydra").mkdir(parents=True)
    lines = "".join(f"- {key}={value}\n" for key, value in given.items())
    (folder / ".hydra" / "overrides.yaml").write_text(lines or "[]\n")
    oracle = bool(given.get("oracle"))
    records = [
        {"step": n, "phase": "rank", "accuracy": a, "rank_value": -a, "judge": "x",
         "oracle": oracle, "unit": given.get("unit", "%")}
        for n, a in enumerate(accuracies, 1)
    ]  # fmt: skip
    times = [{"step": n, "epoch": 0, "seconds": n * pace} for n in range(1, len(records) + 1)]
    for name, rows in (("metrics", records), ("timing", times)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    make_run(tmp_path / "0", [50, 40, 70, 60], 1.0, strategy="random", seed=0)
    make_run(tmp_path / "1", [30, 60, 20, 90], 1.0, strategy="random", seed=1)
    make_run(tmp_path / "2", [10, 80, 20, 20, 95], 2.0, strategy="evolution", seed=0)
    make_run(tmp_path / "3", [20, 40, 60, 10, 10], 2.0, strategy="evolution", seed=1)
    return tmp_path


def test_the_best_so_far_at_equal_evaluations_and_at_equal_seconds(sweep: Path) -> None:
    random, evolution = group(read_courses([sweep]))
    assert (random.name, evolution.name) == ("strategy=random", "strategy=evolution")
    assert random.after.tolist() == [[50, 50, 70, 70], [30, 60, 60, 90]]
    assert evolution.after.tolist() == [[10, 80, 80, 80], [20, 40, 60, 60]]  # cut: 95 is later
    # after two seconds, when all have one, and after four, when the first ends
    assert random.times[0] == 2.0 and random.times[-1] == 4.0
    assert random.at[:, 0].tolist() == [50, 60] and random.at[:, -1].tolist() == [70, 90]
    assert evolution.at[:, 0].tolist() == [10, 20] and evolution.at[:, -1].tolist() == [80, 40]
    rows = summarise([random, evolution])
    assert [row["mean"] for row in rows] == [80, 70]
    assert [row["mean_at_equal_seconds"] for row in rows] == [80, 60]
    assert rows[0]["std"] == pytest.approx(np.std([70, 90], ddof=1))
    assert rows[0]["quartiles"] == [75, 80, 85]
    assert [row["seconds"] for row in rows] == [4, 8] and rows[0]["evaluations"] == 4


def test_the_best_is_so_by_the_ranking_of_the_search(tmp_path: Path) -> None:
    """Under a price an architecture of less accuracy can be better."""
    folder = make_run(tmp_path / "run", [70, 60], 1.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1]["rank_value"] = -100
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (course,) = read_courses([folder])
    assert course.best == (70, 60)


def test_a_search_that_was_resumed_is_one_of_its_seeds(tmp_path: Path) -> None:
    make_run(tmp_path / "0", [70, 80], 1.0, strategy="random", seed=0)
    make_run(tmp_path / "1", [60, 90], 1.0, strategy="random", seed=1, resume="true")
    (one,) = group(read_courses([tmp_path]))
    assert len(one.courses) == 2


def test_the_random_search_of_a_search_stands_beside_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [70, 80], 1.0, strategy="evolution")
    make_run(tmp_path / "run" / "random_search", [60, 65], 1.0)
    names = [course.name for course in read_courses([tmp_path / "run"])]
    assert names == ["strategy=evolution", "strategy=random baseline"]


def test_the_page_says_what_was_compared(sweep: Path, tmp_path: Path) -> None:
    page, rows = write_progress([sweep], tmp_path / "out")
    text = page.read_text()
    assert "4 searches, 4 evaluations each; the longest made 5" in text and "oracle" not in text
    assert "strategy=evolution" in text and "<svg" in text and "70.00" in text
    assert json.loads(page.with_suffix(".json").read_text()) == rows


def test_an_oracle_is_labelled(tmp_path: Path) -> None:
    page, _ = write_progress([make_run(tmp_path / "a", [1.0], 1.0, oracle=1)], tmp_path)
    assert "oracle" in page.read_text()


def test_what_is_no_such_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither a search nor the jobs of a sweep"):
        read_courses([tmp_path])
    folder = make_run(tmp_path / "gradient", [1.0], 1.0)
    (folder / "metrics.jsonl").write_text('{"phase": "search", "step": 1}\n')
    with pytest.raises(ValueError, match="is no search that tried architectures one by one"):
        read_courses([folder])


def test_a_search_that_has_judged_parts_alone_has_no_best_yet(tmp_path: Path) -> None:
    """Their accuracies are not of the space's architectures."""
    folder = make_run(tmp_path / "0", [90, 95, 50, 60], 1.0, strategy="progressive")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:2]:
        line["phase"] = "part"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (alone,) = group(read_courses([folder]))
    assert np.isnan(alone.after[0, :2]).all() and alone.after[0, 2:].tolist() == [50, 60]
    make_run(tmp_path / "1", [10, 20], 1.0, strategy="random")
    path, rows = write_progress([tmp_path], tmp_path / "page")
    assert [row["mean"] for row in rows] == [None, 20] and rows[0]["quartiles"] == [None] * 3
    assert "NaN" not in path.with_suffix(".json").read_text()


def test_scores_are_no_percentages(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [700, 800], 1.0, strategy="random", unit="")
    page, rows = write_progress([tmp_path], tmp_path / "out")
    assert "mean (score)" in page.read_text() and "%" not in page.read_text().split("<body")[1]
    assert rows[0]["unit"] == ""
    make_run(tmp_path / "b", [70, 80], 1.0, strategy="grid")
    page, _ = write_progress([tmp_path], tmp_path / "out")
    assert "best so far (% or score)" in page.read_text()
