"""Whether budgets in milliseconds are hit: several budgets and seeds of a short search.

    python scripts/benchmark_budget.py --shares 0.55 0.7 0.85 --seeds 0 1

Every derived network is measured once more after the search, twice as long: the figure that counts,
since a search keeps the attempt that it measured below the budget. One JSON line a search.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from supernet.choice import Architecture
from supernet_scripts.common import make_space, run_config
from supernet_scripts.measuring import measure_run

SHORT = ("experiment=quickstart", "retrain=false", "strategy.epochs=4", "strategy.warmup_epochs=1")


def search(folder: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "supernet_scripts.search", *SHORT, *overrides]
    subprocess.run([*command, f"run_dir={folder}"], check=True, stdout=subprocess.DEVNULL)


def judge(folder: Path) -> dict[str, Any]:
    """What the search said of its network, and what it needs when measured again."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    cfg = run_config(folder)
    data = instantiate(cfg.data)
    space = make_space(cfg, data)
    measured = measure_run(cfg, folder, data, space)
    architecture = Architecture.load(folder / "architecture.json")
    again = measured.carefully(space, architecture, times=4)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "budget_ms": result["budget"],
        "reachable_ms": result["reachable"],
        "predicted_ms": result["predicted"],
        "measured_ms": result["measured_ms"]["median_ms"],
        "again_ms": again.median_ms,
        "share": again.median_ms / result["budget"],
        "attempts": len(result["attempts"]),
        "binding": result["binding"],
        "multiplier": json.loads(lines[-1])["multiplier"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.55, 0.7, 0.85])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("overrides", nargs="*", help="of the searches, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        for share in args.shares:
            for seed in args.seeds:
                folder = Path(parent) / f"{share}_{seed}"
                own = [f"backend={args.backend}", f"objective.budget_share={share}", f"seed={seed}"]
                search(folder, *own, *args.overrides)
                row = {"budget_share": share, "seed": seed, **judge(folder)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
