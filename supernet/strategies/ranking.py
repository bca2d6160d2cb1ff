"""How a supernet without logits chooses: sample architectures, rank them on the shared weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from supernet.choice import Architecture
from supernet.estimators.inherited import Inherited
from supernet.strategies.base import Problem, Run, rank_record
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)


class Ranking:
    """Bender et al. 2018, section 3.4: architectures sampled within the budget, ranked.

    Args:
        num_candidates: architectures to sample.
        bn_batches: batches for the running statistics of each.
        batch_size: images a batch.
    """

    def __init__(self, num_candidates: int, bn_batches: int, batch_size: int) -> None:
        if num_candidates < 1:
            raise ValueError(
                f"strategy.ranking.num_candidates must be 1 or more; got {num_candidates}"
            )
        self.num_candidates, self.bn_batches, self.batch_size = (
            num_candidates,
            bn_batches,
            batch_size,
        )

    def rank(
        self, state: SearchState, run: Run, candidates: Sequence[Architecture] | None = None
    ) -> None:
        """Sample, and rank into `state.ranked`; processes share the work, a resume keeps it.

        Args:
            candidates: to rank in place of samples.
        """
        problem = state.problem
        candidates = self._sample(problem) if candidates is None else candidates
        judge = Inherited(problem, self.batch_size, self.bn_batches)
        world, rank = problem.accelerator.num_processes, problem.accelerator.process_index
        with run.progress(len(candidates), len(state.ranked), "ranking") as bar:
            while (start := len(state.ranked)) < len(candidates):
                chunk = candidates[start : start + world]
                scores = torch.zeros(world, 2, dtype=torch.float64)
                if rank < len(chunk):
                    scores[rank] = scores.new_tensor(judge.accuracy(chunk[rank]))
                scores = problem.accelerator.reduce(
                    scores.to(problem.accelerator.device), reduction="sum"
                )
                for architecture, (accuracy, loss) in zip(chunk, scores.tolist(), strict=False):
                    record = self._record(state, architecture, accuracy, loss)
                    state.ranked.append(record)
                    run.log(record)
                    bar.update()
                if len(state.ranked) % 20 == 0:
                    run.save(state.state_dict())
        run.save(state.state_dict())
        if run.main:
            log.info(
                "ranked %d architectures; the most accurate has %.1f%% on the architecture half",
                len(state.ranked),
                max(record["accuracy"] for record in state.ranked),
            )

    def _sample(self, problem: Problem) -> list[Architecture]:
        """Distinct architectures within budget and limits; fewer where the range holds fewer."""
        generator = torch.Generator().manual_seed(problem.seed)
        sampler = problem.sampler()
        distinct: dict[Architecture, None] = {}
        for _ in range(20 * self.num_candidates):
            distinct[sampler.sample(generator)] = None
            if len(distinct) == self.num_candidates:
                break
        return list(distinct)

    def _record(
        self, state: SearchState, architecture: Architecture, accuracy: float, loss: float
    ) -> dict[str, Any]:
        return {
            "step": state.step,
            "epoch": state.weight_stream.epoch,
            "candidate": len(state.ranked),
            **rank_record(state.problem, architecture, accuracy, loss),
        }
