"""A Hydra callback that keeps what the jobs of a multirun return, as their sweeper sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Keep(Callback):
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        path = Path(config.hydra.sweep.dir) / "returns.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(job_return.return_value) + "\n")
