"""Predicts the accuracy of cells from that of smaller ones (Liu et al. 2018, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from supernet.recipe import seeded
from supernet.strategies.growth import Cell

EMBEDDING_RANGE = 0.1  # embeddings start uniform around 0
CHUNK = 4096  # cells that are predicted at once


class Surrogate:
    """An ensemble of perceptrons, each fitted from scratch to all but one part of the data.

    A block is the embeddings of its two inputs and its two operations, side by side; a cell of any
    size is the mean of its blocks. The paper has a sigmoid at the end, and starts it at the mean
    accuracy of the first cells; here accuracies are standardised instead, so that scores of any
    range can be predicted. The paper leaves epochs and batches open.

    Args:
        num_members: of the ensemble, and parts of the data.
        embedding, hidden: sizes.
        epochs, batch_size: of each fit.
        first_lr: of Adam, where all cells have one block.
        lr: after that.
    """

    def __init__(
        self,
        *,
        num_members: int,
        embedding: int,
        hidden: int,
        epochs: int,
        batch_size: int,
        first_lr: float,
        lr: float,
    ) -> None:
        given = {
            "num_members": num_members, "embedding": embedding, "hidden": hidden,
            "epochs": epochs, "batch_size": batch_size, "first_lr": first_lr, "lr": lr,
        }  # fmt: skip
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"strategy.surrogate.{name} must be above 0; got {value}")
        self.num_members, self.embedding, self.hidden = num_members, embedding, hidden
        self.epochs, self.batch_size, self.first_lr, self.lr = epochs, batch_size, first_lr, lr

    def fit(
        self,
        cells: Sequence[Cell],
        accuracies: Sequence[float],
        num_states: int,
        num_operations: int,
        generator: torch.Generator,
    ) -> Ensemble:
        """The ensemble that is fitted; it depends on the generator, not on global random state.

        Args:
            num_states: those that a block of the largest cell may read.
        """
        targets = _standardised(accuracies)
        blocks, present = encode(cells)
        lr = self.first_lr if max(map(len, cells)) == 1 else self.lr
        part = torch.randperm(len(cells), generator=generator) % self.num_members
        members = []
        for number in range(self.num_members):
            with seeded(int(torch.randint(2**31, (1,), generator=generator))):
                member = Member(num_states, num_operations, self.embedding, self.hidden)
            rows = torch.nonzero(part != number).flatten()
            rows = rows if len(rows) else torch.arange(len(cells))
            data = blocks[rows], present[rows], targets[rows]
            members.append(self._train(member, *data, lr, generator))
        return Ensemble(members)

    def _train(
        self,
        member: Member,
        blocks: Tensor,
        present: Tensor,
        targets: Tensor,
        lr: float,
        generator: torch.Generator,
    ) -> Member:
        optimizer = torch.optim.Adam(member.parameters(), lr=lr)
        for _ in range(self.epochs):
            order = torch.randperm(len(targets), generator=generator)
            for rows in order.split(self.batch_size):
                optimizer.zero_grad()
                l1_loss(member(blocks[rows], present[rows]), targets[rows]).backward()
                optimizer.step()
        return member


class Member(nn.Module):
    """One perceptron: embeddings, two hidden layers, a number."""

    def __init__(self, num_states: int, num_operations: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.states = nn.Embedding(num_states, embedding)
        self.operations = nn.Embedding(num_operations, embedding)
        for table in (self.states, self.operations):
            nn.init.uniform_(table.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        self.layers = nn.Sequential(
            nn.Linear(4 * embedding, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, blocks: Tensor, present: Tensor) -> Tensor:
        """(N, B, 2, 2) and (N, B), as `encode` gives them -> (N,)."""
        states, operations = self.states(blocks[..., 0]), self.operations(blocks[..., 1])
        embedded = torch.cat([states, operations], dim=2).flatten(2)  # (N, B, 4 * embedding)
        present = present[..., None]
        mean = (embedded * present).sum(1) / present.sum(1)
        return self.layers(mean).squeeze(1)


class Ensemble:
    """What was fitted: the mean of its members."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

    @torch.no_grad()
    def predict(self, cells: Sequence[Cell]) -> list[float]:
        """Scores that order cells as their accuracies would."""
        found = []
        for start in range(0, len(cells), CHUNK):
            data = encode(cells[start : start + CHUNK])
            found += torch.stack([member(*data) for member in self.members]).mean(0).tolist()
        return found


def encode(cells: Sequence[Cell]) -> tuple[Tensor, Tensor]:
    """Inputs and operations as (N, B, 2 sides, 2), and (N, B) which blocks there are: smaller cells
    are filled up with zeros."""
    largest = max(map(len, cells))
    nothing = ((0, 0), (0, 0))
    blocks = torch.tensor([[*cell, *[nothing] * (largest - len(cell))] for cell in cells])
    sizes = torch.tensor([len(cell) for cell in cells])
    return blocks, (torch.arange(largest) < sizes[:, None]).float()


def _standardised(accuracies: Sequence[float]) -> Tensor:
    """Of mean 0 and deviation 1; who diverged without a number has the least."""
    least = min((a for a in accuracies if math.isfinite(a)), default=0.0)
    finite = [a if math.isfinite(a) else least for a in accuracies]
    found = torch.tensor(finite, dtype=torch.float64)
    deviation = found.std(unbiased=False)
    return ((found - found.mean()) / (deviation if deviation > 0 else 1.0)).float()
