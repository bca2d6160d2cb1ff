"""ProxylessNAS binary gates (Cai et al. 2019, section 3.2 and appendix of the official code)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from supernet.mixed_ops.base import PathWeights, Relaxation, Sample


class BinaryGate(Relaxation):
    """A weight step runs one sampled path; an architecture step runs two and updates both logits.

    The two are drawn from p without replacement and p is renormalised over them; one is made
    active. The gates are hard + p - p.detach(): forward only the active path counts, backward
    dL/da_i = sum_j (dL/dg_j) p_j (delta_ij - p_i) (equation 4). `after_step` shifts both logits
    together so that the probabilities of the paths that were not drawn stay as they were.

    The cost term acts on the same pair, its probability mass held fixed; its value is the
    expectation over all paths.
    """

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        return {
            name: PathWeights(tuple(torch.multinomial(p, 1, generator=generator).tolist()))
            for name, p in _on_cpu(logits).items()
        }

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        sample = Sample({}, {})
        for name, p in _on_cpu(logits).items():
            drawn = torch.multinomial(p, min(2, len(p)), generator=generator)
            active = torch.multinomial(p[drawn], 1, generator=generator)
            vector, pair = logits[name], drawn.to(logits[name].device)
            renormalised = torch.softmax(vector[pair], dim=0)
            hard = torch.zeros_like(renormalised)
            hard[active] = 1.0
            gates = hard + (renormalised - renormalised.detach())
            full = torch.softmax(vector.detach(), dim=0)
            moved = full[pair].sum() * renormalised
            sample.weights[name] = PathWeights(tuple(drawn.tolist()), gates)
            sample.cost_weights[name] = full.index_put((pair,), moved)
            sample.mass[name] = torch.logsumexp(vector[pair].detach(), dim=0)
        return sample

    @torch.no_grad()
    def after_step(self, logits: Mapping[str, Tensor], sample: Sample) -> None:
        for name, path in sample.weights.items():
            pair = torch.tensor(path.active, device=logits[name].device)
            shift = sample.mass[name] - torch.logsumexp(logits[name][pair], dim=0)
            logits[name][pair] += shift

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        needed = "binary_gate needs Adam with beta1 = 0 and no weight decay for its logits: "
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
            raise ValueError(
                needed + f"strategy.arch_optimizer.opt makes a {type(optimizer).__name__}; "
                "set it to adam"
            )
        for group in optimizer.param_groups:
            if group["betas"][0] != 0:
                raise ValueError(
                    needed + f"momentum would move paths that were not drawn; got betas="
                    f"{tuple(group['betas'])}, set strategy.arch_optimizer.betas=[0,0.999]"
                )
            if group["weight_decay"] != 0:
                raise ValueError(
                    needed + f"got weight_decay={group['weight_decay']}, "
                    "set strategy.arch_optimizer.weight_decay=0"
                )


def _on_cpu(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities where the shared CPU generator draws: alike in all processes."""
    return {name: torch.softmax(v.detach().double().cpu(), dim=0) for name, v in logits.items()}
