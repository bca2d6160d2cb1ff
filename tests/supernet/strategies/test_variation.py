from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from supernet.mixed_ops.softmax import Softmax
from supernet.spaces.darts import Darts
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.variation import Variation, pick

CELL = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)
SPACES = {"nasbench201": CELL, "darts": Darts(in_chans=1, img_size=8, width=2, num_cells=3)}


class Ungrouped(Darts):
    """Its choices are its genes, tied by the rule of two edges a node."""

    genes = property(lambda self: self.choices)  # type: ignore[assignment]
    encode = NasBench201.encode
    decode = NasBench201.decode


def make(space: Any, make_problem: Any, share: float = 1.0, seed: int = 0) -> Variation:
    problem = make_problem(Softmax(), space=space, share=share)
    return Variation(problem, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SPACES)
def test_one_gene_changes_to_another_option_each_as_often(name: str, make_problem: Any) -> None:
    space = SPACES[name]
    variation = make(space, make_problem)
    parent = variation.draw()
    genes, changed = space.encode(parent), Counter[str]()
    number = 40 * len(space.genes)
    for _ in range(number):
        child = variation.mutate_one(parent)
        now = space.encode(child)
        (gene,) = [key for key in genes if genes[key] != now[key]]
        changed[gene] += 1
        assert space.is_valid(child)
    free = {gene.name for gene in space.genes if len(gene.options) > 1}
    assert set(changed) == free
    expected = number / len(free)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in changed.values())


def test_tied_choices_change_together_and_no_more_than_they_have_to(make_problem: Any) -> None:
    space = Ungrouped(in_chans=1, img_size=8, width=2, num_cells=3)
    variation = make(space, make_problem)
    parent = variation.draw()
    sizes = Counter[int]()
    for _ in range(200):
        child = variation.mutate_one(parent)
        assert space.is_valid(child) and child != parent
        sizes[len(set(child) - set(parent))] += 1
    assert set(sizes) == {1, 2}  # another operation, or an edge for another one


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_each_gene_changes_with_the_probability(probability: float, make_problem: Any) -> None:
    variation = make(CELL, make_problem)
    parent = CELL.architecture({choice.name: "nor_conv_3x3" for choice in CELL.choices})
    number = 1000
    children = (variation.mutate(parent, probability) for _ in range(number))
    changes = sum(len(set(child) - set(parent)) for child in children)
    expected = number * 6 * probability
    assert abs(changes - expected) < 0.12 * expected  # a few are tried again: they are not valid


@pytest.mark.parametrize("space", [*SPACES.values(), Ungrouped(in_chans=1, img_size=8, width=2)])
def test_a_child_of_two_has_its_genes_of_either(space: Any, make_problem: Any) -> None:
    variation = make(space, make_problem)
    mother, father = variation.draw(), variation.draw()
    one, other = space.encode(mother), space.encode(father)
    sources = Counter[bool]()
    for _ in range(50):
        child = space.encode(variation.cross(mother, father))
        assert all(child[gene] in (one[gene], other[gene]) for gene in child)
        sources.update(child[gene] == one[gene] for gene in child if one[gene] != other[gene])
    assert abs(sources[True] - sources[False]) < 0.2 * sources.total()


def test_all_are_within_the_budget(make_problem: Any) -> None:
    variation = make(CELL, make_problem, share=0.4)
    one, other = variation.draw(), variation.draw()
    for _ in range(50):
        for child in (
            variation.mutate_one(one), variation.mutate(one, 0.5), variation.cross(one, other),
        ):  # fmt: skip
            assert variation.problem.is_feasible(child)


def test_what_is_new_is_preferred(make_problem: Any) -> None:
    variation = make(CELL, make_problem)
    drawn = [variation.draw() for _ in range(3)]
    queue = [drawn[0], drawn[0], drawn[1], drawn[2]]
    assert variation.unseen(lambda: queue.pop(0), {drawn[0]}) == drawn[1]
    assert variation.unseen(lambda: drawn[0], {drawn[0]}) == drawn[0]


def test_excluded_options_do_not_come_back(make_problem: Any) -> None:
    space = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)
    space.exclude(["*=none", "*=avg_pool_3x3"])
    variation = make(space, make_problem)
    child = variation.draw()
    for _ in range(60):
        child = variation.mutate_one(child)
        assert {"none", "avg_pool_3x3"}.isdisjoint(option for _, option in child)


def test_pick_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(pick("abc", generator) for _ in range(900))
    assert all(abs(count - 300) < 75 for count in counts.values())
