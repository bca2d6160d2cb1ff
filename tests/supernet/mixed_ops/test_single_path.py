from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from supernet.mixed_ops.single_path import SinglePath
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.mbconv import MBConv

MBCONV = {"stem_chs": 8, "first_chs": 8, "stages": [[8, 2, 2]], "kernels": [3, 5], "head_chs": 16}


def draw(space: SearchSpace, number: int) -> list[dict[str, str]]:
    """The options that run, by choice, of so many weight steps."""
    relaxation, generator = SinglePath(), torch.Generator().manual_seed(0)
    relaxation.begin(space)
    logits = {choice.name: torch.randn(len(choice.options)) for choice in space.choices}
    drawn = []
    for step in range(number):
        weights = relaxation.for_weight_step(logits, generator, step / number)
        assert all(len(path.active) == 1 and path.values is None for path in weights.values())
        active = {name: path.active[0] for name, path in weights.items()}
        drawn.append({c.name: c.options[active[c.name]] for c in space.choices})
    return drawn


def test_options_are_drawn_uniformly_whatever_the_logits() -> None:
    space, number = MBConv(**MBCONV), 6000
    counts = Counter(tuple(options.values()) for options in draw(space, number))
    assert len(counts) == space.size == 4 * 5
    p = 1 / space.size
    for count in counts.values():
        assert count / number == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / number))


def test_what_is_excluded_is_not_trained() -> None:
    space = MBConv(**MBCONV)
    space.exclude(["*=k5_e6", "stage1_1=zero"])
    assert len({tuple(options.values()) for options in draw(space, 300)}) == 3 * 3


def test_tied_choices_are_drawn_together() -> None:
    """In cells of DARTS: two edges of each node, all pairs as often, never `none` on them."""
    space, number = Darts(width=4, num_cells=3), 1500
    pairs: Counter[tuple[str, ...]] = Counter()
    for options in draw(space, number):
        assert space.is_valid(space.architecture(options))
        edges = [f"normal_{source}_4" for source in range(4)]
        pairs[tuple(name for name in edges if options[name] != "none")] += 1
    assert len(pairs) == math.comb(4, 2) and {len(pair) for pair in pairs} == {2}
    for count in pairs.values():
        assert count / number == pytest.approx(1 / 6, abs=4 * math.sqrt(5 / 36 / number))


def test_has_no_logits() -> None:
    assert not SinglePath.has_logits
