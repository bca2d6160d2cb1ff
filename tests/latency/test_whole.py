from __future__ import annotations

from pathlib import Path

import torch

from latency.whole import WholeLatency
from supernet.choice import Architecture
from supernet.spaces.nas_rl import NasRL

SPACE = NasRL(in_chans=1, img_size=8, num_layers=2)


def test_each_network_is_measured_once_also_by_a_search_that_is_resumed(tmp_path: Path) -> None:
    asked: list[Architecture] = []

    def measure(architecture: Architecture) -> float:
        asked.append(architecture)
        return len(asked) / 7

    generator = torch.Generator().manual_seed(0)
    first, second, third = (SPACE.sample(generator) for _ in range(3))
    cost = WholeLatency(SPACE, measure, tmp_path / "known.jsonl")
    assert cost.first is None and (cost.name, cost.unit) == ("latency", "ms")
    assert [cost.of(a) for a in (first, second, first)] == [1 / 7, 2 / 7, 1 / 7]
    again = WholeLatency(SPACE, measure, tmp_path / "known.jsonl")
    assert cost.first == again.first == (first, 1 / 7)
    assert [again.of(a) for a in (third, second, first)] == [3 / 7, 2 / 7, 1 / 7]
    assert asked == [first, second, third]
