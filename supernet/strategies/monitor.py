"""Watches a gradient search for collapse: skips or nothing everywhere, sharp minima."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from supernet.checkpoint import load_checkpoint, save_checkpoint
from supernet.mixed_ops.base import Relaxation
from supernet.strategies.base import Run
from supernet.strategies.curvature import curvature
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "rollback")


class Monitor:
    """Judges every epoch of the search by what would be derived after it, and by the curvature.

    The rule of curvature is that of DARTS-ES (Zela et al. 2020, section 4.3): the mean of the last
    `window` eigenvalues is more than `max_growth` times the mean `lag` eigenvalues before. (The
    paper says 1 / 0.75 and a lag of 5, the authors' code 1.3 and 4, both a window of 5.)

    Args:
        action: "warn" logs a line a rule; "stop" ends the search there; "rollback" ends it with
            logits and weights as they were in the last good epoch: the last one within the shares,
            or the one `lag` eigenvalues ago.
        max_skip_share: of the derived architecture's choices that are not absent, those that
            compute nothing; None for no rule.
        max_none_share: those that carry nothing.
        curvature_every: epochs from one eigenvalue to the next; 0 for none. One takes about as
            long as four times `iterations` architecture steps.
        window, lag, max_growth: of the rule above.
        iterations: of Lanczos.
    """

    def __init__(
        self,
        *,
        action: str = "warn",
        max_skip_share: float | None = 0.75,
        max_none_share: float | None = 0.5,
        curvature_every: int = 0,
        window: int = 5,
        lag: int = 5,
        max_growth: float = 1 / 0.75,
        iterations: int = 10,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(
                f"strategy.monitor.action={action!r} is unknown; valid: {', '.join(ACTIONS)}"
            )
        for name, value, least in (
            ("max_skip_share", max_skip_share, 0),
            ("max_none_share", max_none_share, 0),
            ("curvature_every", curvature_every, 0),
            ("window", window, 1),
            ("lag", lag, 1),
            ("max_growth", max_growth, 1),
            ("iterations", iterations, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"strategy.monitor.{name} must be {least} or more; got {value}")
        self.action, self.iterations = action, iterations
        self.max_shares = {"skip": max_skip_share, "none": max_none_share}
        self.curvature_every, self.window, self.lag = curvature_every, window, lag
        self.max_growth = max_growth

    def check(self, relaxation: Relaxation) -> None:
        """Refuse a relaxation that the curvature is not defined for.

        Raises:
            ValueError: says what to set.
        """
        if self.curvature_every and not relaxation.mixes_all:
            raise ValueError(
                f"strategy.monitor.curvature_every={self.curvature_every} needs a mixed op in "
                "which every candidate runs (softmax, beta_softmax, sigmoid, partial_channels), "
                f"not {type(relaxation).__name__}; set it to 0"
            )

    def measure(
        self, state: SearchState, epoch: int, memory_format: torch.memory_format
    ) -> dict[str, float]:
        """What the record of an epoch (from 0) has of the curvature."""
        if not self.curvature_every or (epoch + 1) % self.curvature_every:
            return {}
        found = curvature(state, memory_format, self.iterations)
        state.monitor.curvatures.append((epoch + 1, found))
        return {"curvature": found}

    def judge(self, state: SearchState, run: Run, record: Mapping[str, Any]) -> None:
        """Act on the record of an epoch; afterwards `state.monitor.over` tells whether to end."""
        broken = self._broken(state, record)
        memory, epoch = state.monitor, record["epoch"]
        good = None if broken is None else broken[2]
        if self.action == "rollback":
            if broken is None:
                memory.good = epoch
            self._keep(state, run, epoch)
        if broken is None:
            return
        rule, why, _ = broken
        memory.warned.append(rule)
        memory.over = self.action != "warn"
        end = {"warn": "the search goes on", "stop": "the search ends here"}.get(self.action, "")
        if self.action == "rollback":
            end = "the search ends here: there was no good epoch to go back to"
            if good is not None:
                self._restore(state, run, good)
                end = f"the search ends as it was after epoch {good}"
        run.log({
            "step": state.step, "epoch": epoch, "phase": "monitor", "action": self.action,
            "rule": rule, "why": why, "good_epoch": good if self.action == "rollback" else None,
        })  # fmt: skip
        if run.main:
            log.warning("collapse: %s in epoch %d; %s", why, epoch, end)

    def _broken(
        self, state: SearchState, record: Mapping[str, Any]
    ) -> tuple[str, str, int | None] | None:
        """The first rule that is newly broken: its name, why, and the last good epoch."""
        memory = state.monitor
        for name, upper in self.max_shares.items():
            share = record[f"derived_{name}_share"]
            if upper is not None and share > upper and name not in memory.warned:
                what = {"skip": "compute nothing", "none": "carry nothing"}[name]
                why = f"{100 * share:.0f}% of the derived architecture's choices {what}"
                return name, f"{why} (more than {100 * upper:.0f}%)", memory.good
        values = [value for _, value in memory.curvatures]
        known = "curvature" in record and "curvature" not in memory.warned
        if known and len(values) >= self.window + self.lag:
            now = sum(values[-self.window :]) / self.window
            before = sum(values[-self.window - self.lag : -self.lag]) / self.window
            if before > 0 and now > self.max_growth * before:
                why = f"the curvature grew from {before:.3g} to {now:.3g}"
                why += f" (more than {self.max_growth:.3g} times)"
                return "curvature", why, memory.curvatures[-1 - self.lag][0]
        return None

    def _keep(self, state: SearchState, run: Run, epoch: int) -> None:
        """Keep what a rollback may go back to; a kill before the next checkpoint finds it all."""
        state.problem.accelerator.wait_for_everyone()
        if not run.main:
            return
        whole = state.state_dict()
        save_checkpoint(_path(run, epoch), {name: whole[name] for name in KEPT})
        oldest = epoch - self.lag * self.curvature_every
        oldest = min(oldest, state.monitor.good or epoch) - 1
        for path in run.checkpoint.parent.glob("epoch_*.safetensors"):
            if int(path.stem.removeprefix("epoch_")) < oldest:
                path.unlink()

    def _restore(self, state: SearchState, run: Run, epoch: int) -> None:
        state.problem.accelerator.wait_for_everyone()
        kept = load_checkpoint(_path(run, epoch))
        state.load_part(kept)
        # what goes on from there, a selection, goes on with its momentum
        state.weight_optimizer.load_state_dict(kept["weight_optimizer"])


KEPT = ("supernet", "logits", "objective", "weight_optimizer")


def _path(run: Run, epoch: int) -> Path:
    return run.checkpoint.parent / f"epoch_{epoch}.safetensors"
