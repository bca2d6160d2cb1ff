from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from latency.model import AdditiveCost
from supernet.benchmark import Benchmark, best_within
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

SPACE = NasBench201()
CELLS = [
    f"|{op}~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"
    for op in ("none", "skip_connect", "nor_conv_1x1")
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def table(path: Path) -> Path:
    rows = "".join(f"{cell},{value}\n" for cell, value in zip(CELLS, (90.5, 91, 90.5), strict=True))
    return write(path, f"architecture,test\n{rows}")


def test_accuracy_and_rank(tmp_path: Path) -> None:
    benchmark = Benchmark.load(table(tmp_path / "a.csv"))
    found = [benchmark.judge(SPACE, SPACE.from_string(cell)) for cell in CELLS]
    assert [f["accuracy"] for f in found] == [90.5, 91.0, 90.5]
    assert [f["rank"] for f in found] == [2, 1, 2]
    assert (found[0]["name"], found[0]["of"], found[0]["best"]) == ("test", 3, 91.0)


def test_the_table_of_the_real_benchmark(data_folder: Path) -> None:
    benchmark = Benchmark.load(data_folder / "nasbench201-cifar10.csv")
    assert len(benchmark.accuracies) == 15625
    all_3x3 = SPACE.architecture({choice.name: "nor_conv_3x3" for choice in SPACE.choices})
    assert benchmark.judge(SPACE, all_3x3)["accuracy"] == pytest.approx(93.76)


def test_front_holds_the_best_at_every_cost() -> None:
    """Against a look at all of the table's architectures, for every cost that there is."""
    space = NasBench201(in_chans=1, img_size=8, widths=[4], num_cells=1)
    space.exclude(["edge_0_1=none"])
    generator = torch.Generator().manual_seed(3)
    cost = AdditiveCost(
        space.choices, 0.5,
        {c.name: torch.randint(0, 4, (5,), generator=generator).double() for c in space.choices},
        "macs", "",
    )  # fmt: skip
    drawn = sorted({space.to_string(space.sample(generator)) for _ in range(60)})
    values = torch.rand(len(drawn), generator=generator).tolist()
    accuracies = {**dict(zip(drawn, values, strict=True)), CELLS[0]: 9.0}  # which is excluded
    front = Benchmark("test", accuracies, "here").front(space, cost)
    costs = {text: cost.of(space.from_string(text)) for text in drawn}
    for budget in [0.0, *costs.values()]:
        within = [accuracies[text] for text in drawn if costs[text] <= budget]
        assert best_within(front, budget) == max(within, default=-math.inf)
    assert len(front) > 1 and front == sorted(front)
    assert [accuracy for _, accuracy in front] == sorted({accuracy for _, accuracy in front})


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        Benchmark.load(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no column 'architecture'"):
        Benchmark.load(write(tmp_path / "b.csv", "a,b\n1,2\n"))
    two = write(tmp_path / "c.csv", "architecture,valid,test\nx,1,2\n")
    with pytest.raises(ValueError, match="columns valid, test; name one by column=NAME"):
        Benchmark.load(two)
    assert Benchmark.load(two, "test").accuracies == {"x": 2.0}
    with pytest.raises(ValueError, match="no column 'train'; valid: valid, test"):
        Benchmark.load(two, "train")
    with pytest.raises(ValueError, match="line 2: test is 'high', no number"):
        Benchmark.load(write(tmp_path / "d.csv", "architecture,test\nx,high\n"))
    with pytest.raises(ValueError, match="holds no architecture"):
        Benchmark.load(write(tmp_path / "e.csv", "architecture,test\n"))


def test_before_a_search_only_the_header_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "architecture,valid,test\nno cell,high,\n")
    Benchmark.check(path, "test", SPACE)
    with pytest.raises(ValueError, match="no column 'tset'; valid: valid, test"):
        Benchmark.check(path, "tset", SPACE)
    with pytest.raises(ValueError, match="columns valid, test; name one by column=NAME"):
        Benchmark.check(path, None, SPACE)
    with pytest.raises(ValueError, match="is not a file"):
        Benchmark.check(tmp_path / "none.csv", "test", SPACE)
    with pytest.raises(ValueError, match="has no notation that a benchmark table could use"):
        Benchmark.check(path, "test", MBConv(in_chans=1, img_size=32))


def test_another_space_is_refused(tmp_path: Path) -> None:
    benchmark = Benchmark.load(table(tmp_path / "a.csv"))
    mbconv = MBConv(in_chans=1, img_size=32)
    architecture = mbconv.architecture({c.name: c.options[0] for c in mbconv.choices})
    with pytest.raises(ValueError, match="no notation"):
        benchmark.judge(mbconv, architecture)
    other = SPACE.architecture({choice.name: "avg_pool_3x3" for choice in SPACE.choices})
    with pytest.raises(ValueError, match="of another space"):
        benchmark.judge(SPACE, other)
