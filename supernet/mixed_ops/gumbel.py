"""Gumbel-softmax: GDAS (Dong & Yang 2019, hard samples), FBNet (Wu et al. 2019, soft ones)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample

SCHEDULES = ("linear", "exponential")


class Gumbel(Relaxation):
    """Weights are a sample of softmax((log p + g) / tau), g new Gumbel noise in every step.

    Hard (GDAS), the largest candidate alone runs, with the factor 1 + h_i - h_i.detach(): h is the
    sample, so the gradient is that of its soft weight. Soft (FBNet), all candidates run. The cost
    term sees the probabilities themselves, of which the samples are noisy copies.

    Args:
        hard: run the sampled candidate alone.
        tau: temperature of the warm-up and of the step after it; tau_end: of the last step.
        schedule: "linear" (GDAS: from 10 to 0.1) or "exponential" (FBNet: 5 times 0.956 an epoch,
            which 90 epochs take to 0.09).
    """

    def __init__(
        self,
        hard: bool = True,
        tau: float = 10.0,
        tau_end: float = 0.1,
        schedule: str = "linear",
    ) -> None:
        if not (tau > 0 and tau_end > 0):
            raise ValueError(
                f"mixed_op.tau and mixed_op.tau_end must be above 0; got {tau} and {tau_end}"
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"mixed_op.schedule={schedule!r} is unknown; valid: {', '.join(SCHEDULES)}"
            )
        self.hard, self.tau, self.tau_end, self.schedule = hard, tau, tau_end, schedule

    def temperature(self, progress: float) -> float:
        if self.schedule == "linear":
            return self.tau + (self.tau_end - self.tau) * progress
        return self.tau * (self.tau_end / self.tau) ** progress

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        detached = {name: vector.detach() for name, vector in logits.items()}
        weights = self._sample(detached, generator, progress)
        if not self.hard:
            return weights
        return {name: PathWeights(path.active) for name, path in weights.items()}

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        return Sample(self._sample(logits, generator, progress), self.probabilities(logits))

    def _sample(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        tau = self.temperature(progress)
        weights = {}
        for name, vector in logits.items():
            # On the CPU, where all processes draw alike.
            uniform = torch.rand(len(vector), generator=generator, dtype=torch.float64)
            noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16))).to(vector)
            soft = torch.softmax((torch.log_softmax(vector, dim=0) + noise) / tau, dim=0)
            if not self.hard:
                weights[name] = PathWeights(tuple(range(len(vector))), soft)
                continue
            index = int(soft.detach().argmax())
            chosen = soft[index : index + 1]
            weights[name] = PathWeights((index,), 1.0 + (chosen - chosen.detach()))
        return weights
