"""One rank of a training on two processes, of which the second alone meets a loss that is not
finite; writes how it ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from supernet.engine import Diverged, make_accelerator
from supernet.learner import Learner
from supernet.recipe import Recipe
from supernet.spaces.nasbench201 import NasBench201


def main(folder: Path) -> None:
    accelerator = make_accelerator("no", "cpu")
    space = NasBench201(in_chans=1, widths=(4,), num_cells=1, img_size=8)
    cell = space.architecture(dict.fromkeys(space.by_name, "nor_conv_1x1"))
    learner = Learner(space.build_network(cell, 10).train(), Recipe(1, 4), 5, accelerator, seed=3)
    images, labels, message = torch.ones(4, 1, 8, 8), torch.arange(4), ""
    try:
        for step in range(3):
            scale = float("inf") if step == accelerator.process_index == 1 else 1.0
            learner.take_step(scale * images, labels)
    except Diverged as error:
        message = str(error)
    # what every process does next
    steps = accelerator.reduce(torch.tensor(float(learner.step)), reduction="sum").item()
    content = {"message": message, "step": learner.step, "steps": steps}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(content))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
