"""ProxylessNAS with REINFORCE (Cai et al. 2019, section 3.3.2, equation 5; Williams 1992)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.engine import at_least_float
from supernet.mixed_ops.base import PathWeights, Sample
from supernet.strategies.base import Problem
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.state import SearchState

Options = dict[str, int]  # by choice, the index of the option


class ProxylessReinforce(FirstOrder):
    """The logits follow the score-function gradient of the expected loss of a sampled network.

    An architecture step runs `num_samples` single paths on one batch, without gradients:
    d/da E[L] = E[(L - b) d/da log p]. The baseline b of a sample is the mean loss of the others,
    which leaves the estimate unbiased. The cost term is differentiable as it is.

    Args:
        num_samples: paths a step, 2 or more.
        settings: as `FirstOrder`.
    """

    def __init__(self, *, num_samples: int = 8, **settings: Any) -> None:
        super().__init__(**settings)
        if num_samples < 2:
            raise ValueError(f"strategy.num_samples must be 2 or more; got {num_samples}")
        self.num_samples = num_samples

    def search(self, problem: Problem, run: Any) -> Any:
        name = type(problem.relaxation).__name__
        if not problem.relaxation.has_logits:
            raise ValueError(f"strategy=proxyless_reinforce needs logits, and {name} has none")
        if not problem.relaxation.competing:
            raise ValueError(
                "strategy=proxyless_reinforce samples paths by the softmax of the logits, which "
                f"{name} does not have: its options do not compete; use another mixed op, such as "
                "binary_gate"
            )
        if problem.relaxation.nodes(problem.space.choices):
            raise ValueError(
                "strategy=proxyless_reinforce runs one path at a time, which says nothing of what "
                f"the inputs of a node weigh in {name}; set mixed_op.edge_norm=false"
            )
        return super().search(problem, run)

    def sample(self, state: SearchState, logits: Mapping[str, Tensor], progress: float) -> Sample:
        """Nothing yet: the probabilities alone, for the cost."""
        return Sample({}, {name: torch.softmax(v, dim=0) for name, v in logits.items()})

    def task_loss(
        self, state: SearchState, sample: Sample, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        drawn, losses, outputs = [], [], images
        for _ in range(self.num_samples):
            options = {
                # on the CPU, where all processes draw alike
                name: int(torch.multinomial(p.detach().cpu(), 1, generator=state.generator))
                for name, p in sample.cost_weights.items()
            }
            loss, outputs = self.loss_of(state, options, images, labels)
            drawn.append(options)
            losses.append(loss)
        log_p = torch.stack([sum_of_logs(sample.cost_weights, options) for options in drawn])
        loss = torch.stack(losses)
        mean_of_others = (loss.sum() - loss) / (self.num_samples - 1)
        score = ((loss - mean_of_others) * log_p).mean()
        return loss.mean() + (score - score.detach()), outputs  # the mean loss, with this gradient

    def loss_of(
        self, state: SearchState, options: Options, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and outputs of one path, without gradients."""
        weights = {name: PathWeights((index,)) for name, index in options.items()}
        with torch.no_grad(), state.problem.accelerator.autocast():
            outputs = state.problem.supernet(images, weights)
        return cross_entropy(at_least_float(outputs), labels), outputs


def sum_of_logs(probabilities: Mapping[str, Tensor], options: Options) -> Tensor:
    """log p of a path."""
    return torch.stack([probabilities[name][index].log() for name, index in options.items()]).sum()
