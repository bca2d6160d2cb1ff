"""The recurrent controller of NAS-RL, NASNet and ENAS: a distribution over genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supernet.choice import Choice

INIT_RANGE = 0.1  # of all parameters, uniform around 0, as in the official code of ENAS


class Drawn(NamedTuple):
    """Genes that a controller drew, or was asked about.

    Attributes:
        genes: option by gene.
        log_prob: of all of them together; a scalar, as the others.
        entropy: of the distributions they were drawn from, summed.
        skip_kl: KL divergence of the skip decisions from their rate, summed over those of a layer;
            the mean over layers that have any.
    """

    genes: dict[str, str]
    log_prob: Tensor
    entropy: Tensor
    skip_kl: Tensor


@dataclass(frozen=True)
class Squash:
    """What becomes of logits: tanh_constant * tanh(logits / temperature) (Bello et al. 2017).

    Attributes:
        tanh_constant: None for logits as they are, divided by the temperature.
    """

    temperature: float = 1.0
    tanh_constant: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits / self.temperature
        if self.tanh_constant is not None:
            logits = self.tanh_constant * torch.tanh(logits)
        return logits


class Controller(nn.Module):
    """An LSTM that predicts gene after gene, each by a softmax (Zoph & Le 2017, section 3.1).

    What was drawn is embedded and goes into the next step. Genes of equal options share embedding
    and softmax, as in ENAS, or each has its own, as in NAS-RL. Whether a layer reads an earlier one
    is decided by attention, P = softmax of [-q, q] with q = v^T tanh(W_prev h_j + W_curr h_i)
    (section 3.3; ENAS, general_controller.py); all skips of a layer are one step.

    Args:
        genes: in the order of prediction.
        anchors: which of them are skips (`SearchSpace.anchors`).
        hidden: size of states and embeddings.
        num_layers: of the LSTM.
        shared: genes of equal options share embedding and softmax.
        squash: of the logits.
        skip_rate: share of skips that the KL divergence is from.
        generator: draws the initial parameters.
    """

    def __init__(
        self,
        genes: Sequence[Choice],
        anchors: Mapping[str, str],
        *,
        hidden: int,
        num_layers: int,
        shared: bool,
        squash: Squash,
        skip_rate: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.genes, self.anchors, self.squash = tuple(genes), dict(anchors), squash
        self.hidden, self.num_layers, self.skip_rate = hidden, num_layers, skip_rate
        for gene in self.genes:
            if gene.name in self.anchors and len(gene.options) != 2:
                raise ValueError(f"skip {gene.name!r} must have two options, not {gene.options}")
        kinds: dict[tuple[str, ...] | str, int] = {}
        self.kinds = {  # number of its embedding and softmax
            gene.name: kinds.setdefault(gene.options if shared else gene.name, len(kinds))
            for gene in self.genes
            if gene.name not in self.anchors
        }
        sizes = {self.kinds[g.name]: len(g.options) for g in self.genes if g.name in self.kinds}
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(num_layers))
        self.start = nn.Parameter(torch.empty(1, hidden))
        self.embeddings = nn.ModuleList(nn.Embedding(n, hidden) for n in sizes.values())
        self.heads = nn.ModuleList(nn.Linear(hidden, n, bias=False) for n in sizes.values())
        if self.anchors:
            self.previous = nn.Linear(hidden, hidden, bias=False)
            self.current = nn.Linear(hidden, hidden, bias=False)
            self.vector = nn.Linear(hidden, 1, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE, generator=generator)

    def forward(
        self, generator: torch.Generator | None = None, genes: Mapping[str, str] | None = None
    ) -> Drawn:
        """Draw genes, or say how probable given ones are.

        Args:
            generator: of the draws; not needed where genes are given.
            genes: option by gene.
        """
        walk = _Walk(self, generator, genes)
        for gene in self.genes:
            if gene.name in self.anchors:
                walk.skip(gene)
            else:
                walk.predict(gene)
        return walk.drawn()


class _Walk:
    """One pass of a controller over its genes."""

    def __init__(
        self,
        controller: Controller,
        generator: torch.Generator | None,
        genes: Mapping[str, str] | None,
    ) -> None:
        self.controller, self.generator, self.given = controller, generator, genes
        self.state = [
            (controller.start.new_zeros(1, controller.hidden),) * 2
            for _ in range(controller.num_layers)
        ]
        self.input: Tensor = controller.start
        self.genes: dict[str, str] = {}
        self.log_probs: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.skip_kls: list[list[Tensor]] = []  # by layer
        self.states: dict[str, Tensor] = {}  # at each gene that is no skip
        self.skipping: Tensor | None = None  # state at the present layer's skips
        self.read: list[Tensor] = []  # states of the layers that it reads

    def step(self) -> Tensor:
        """(1, hidden) of the last LSTM layer."""
        x = self.input
        for index, cell in enumerate(self.controller.cells):
            self.state[index] = cell(x, self.state[index])
            x = self.state[index][0]
        return x

    def predict(self, gene: Choice) -> None:
        self._end_skips()
        hidden = self.step()
        self.states[gene.name] = hidden
        kind = self.controller.kinds[gene.name]
        index = self._decide(gene, self.controller.heads[kind](hidden)[0])
        self.input = self.controller.embeddings[kind](torch.tensor([index], device=hidden.device))

    def skip(self, gene: Choice) -> None:
        if self.skipping is None:
            self.skipping = self.step()
            self.skip_kls.append([])
        anchor = self.states[self.controller.anchors[gene.name]]
        both = self.controller.previous(anchor) + self.controller.current(self.skipping)
        query = self.controller.vector(torch.tanh(both))[0]
        log_p = torch.log_softmax(self.controller.squash(torch.cat([-query, query])), dim=0)
        rate = log_p.new_tensor([1 - self.controller.skip_rate, self.controller.skip_rate])
        self.skip_kls[-1].append((log_p.exp() * (log_p - rate.log())).sum())
        if self._decide(gene, torch.cat([-query, query])) == 1:
            self.read.append(anchor)

    def _end_skips(self) -> None:
        """The next input is the sum of the states that are read, over one more than they are."""
        if self.skipping is not None:
            zero = torch.zeros_like(self.skipping)
            self.input = torch.stack([zero, *self.read]).mean(dim=0)
            self.skipping, self.read = None, []

    def _decide(self, gene: Choice, logits: Tensor) -> int:
        log_p = torch.log_softmax(self.controller.squash(logits), dim=0)
        if self.given is not None:
            index = gene.index(self.given[gene.name])
        else:
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=self.generator)
            index = int(drawn)
        self.genes[gene.name] = gene.options[index]
        self.log_probs.append(log_p[index])
        self.entropies.append(-(log_p.exp() * log_p).sum())
        return index

    def drawn(self) -> Drawn:
        zero = self.controller.start.new_zeros(())
        layers = [torch.stack(layer).sum() for layer in self.skip_kls]
        kl = torch.stack(layers).mean() if layers else zero
        return Drawn(
            self.genes, torch.stack(self.log_probs).sum(), torch.stack(self.entropies).sum(), kl
        )
