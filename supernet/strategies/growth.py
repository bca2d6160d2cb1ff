"""Cells that grow block by block (Liu et al. 2018, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations_with_replacement, product
from typing import TypeGuard

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.space import SearchSpace
from supernet.spaces.block_cell import NUM_INPUTS, SIDES
from supernet.spaces.blocks import BlockSpace
from supernet.strategies.base import Problem

Side = tuple[int, int]  # the state that is read, the number of the operation
Block = tuple[Side, ...]  # its two sides, sorted
Cell = tuple[Block, ...]


def grows(space: SearchSpace) -> TypeGuard[BlockSpace]:
    """Whether its architectures are cells as they are here: one kind, two sides that are added."""
    return (
        isinstance(space, BlockSpace)
        and len(space.kinds) == 1
        and len(space.combinations) == 1
    )


def canonical(cell: Cell) -> Cell:
    """One cell for all that differ in the order of sides and blocks alone: of the orders in which
    blocks come after those that they read, the one that is least."""
    ways = [(Cell(), {state: state for state in range(NUM_INPUTS)}, frozenset(range(len(cell))))]
    for number in range(len(cell)):
        longer = []
        for placed, numbers, others in ways:
            for index in others:
                if all(state in numbers for state, _ in cell[index]):
                    block = tuple(sorted((numbers[state], op) for state, op in cell[index]))
                    renamed = {**numbers, NUM_INPUTS + index: NUM_INPUTS + number}
                    longer.append(((*placed, block), renamed, others - {index}))
        least = min(way[0] for way in longer)
        ways = [way for way in longer if way[0] == least]  # equal blocks may be read unequally
    return ways[0][0]


def expand(cells: Iterable[Cell], num_operations: int) -> list[Cell]:
    """All cells with one block more, each once."""
    found: dict[Cell, None] = {}
    for cell in cells:
        sides = product(range(NUM_INPUTS + len(cell)), range(num_operations))
        for block in combinations_with_replacement(sides, 2):
            found[canonical((*cell, block))] = None
    return list(found)


def options(space: BlockSpace, cell: Cell) -> dict[str, str]:
    """By choice; of a cell of fewer blocks than the space's, those it has."""
    (kind,) = space.kinds
    return {
        f"{kind}_{state}_{name}": f"{source}_{space.operations[operation]}"
        for state, block in enumerate(cell, NUM_INPUTS)
        for name, (source, operation) in zip(SIDES, block, strict=True)
    }


def allows(space: BlockSpace, cell: Cell) -> bool:
    """Whether a cell with too few blocks holds nothing that is excluded."""
    found = options(space, cell).items()
    return space.excluded.isdisjoint(found) and all(
        sum(rule.terms.get(pair, 0.0) for pair in found) <= rule.upper
        for rule in space.constraints
        if min(rule.terms.values(), default=0.0) >= 0
    )


class Growth:
    """The cells of a problem, as architectures of as many blocks as they have."""

    def __init__(self, problem: Problem) -> None:
        space = problem.space
        assert grows(space), space.id
        self.problem, self.space, self.num_blocks = problem, space, space.num_blocks
        self._space = cache(lambda num_blocks: space.resettled({"num_blocks": num_blocks}))

    def architecture(self, cell: Cell) -> Architecture:
        whole = len(cell) == self.num_blocks
        space = self.space if whole else self._space(len(cell))
        return space.architecture(options(self.space, cell))

    def fits(self, cell: Cell) -> bool:
        """Whether the cell is within budget and limits or, with too few blocks, may yet be."""
        if len(cell) == self.num_blocks:
            return self.problem.is_feasible(self.architecture(cell))
        found, objective = options(self.space, cell), self.problem.objective
        costs = [(limit.cost, limit.upper) for limit in self.problem.limits]
        if objective.budget is not None:
            costs.append((self.problem.cost, objective.budget))
        return allows(self.space, cell) and all(
            _least(cost, found) <= upper for cost, upper in costs if isinstance(cost, AdditiveCost)
        )


def _least(cost: AdditiveCost, options: dict[str, str]) -> float:
    """Cost of the cheapest network that has the options."""
    return cost.fixed + sum(
        float(values[choice.index(options[choice.name])] if choice.name in options
              else values.min())
        for choice, values in ((c, cost.per_option[c.name]) for c in cost.choices)
    )  # fmt: skip
