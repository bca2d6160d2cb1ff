"""supernet-compare: searches that try architectures, the best so far of each side by side."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from supernet.report.progress import write_progress
from supernet_scripts.common import command


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="compare")
@command
def _main(cfg: DictConfig) -> None:
    page, rows = write_progress(list(cfg.runs), cfg.output)
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        oracle = ", oracle" if row["oracle"] else ""
        print(
            f"{row['name']}: {row['mean']:.2f}{spread}% (n={row['n']}{oracle}) after "
            f"{row['evaluations']} evaluations, {row['seconds']:.3g} s"
        )
    print(f"report: {page}")


def main() -> None:
    _main()


if __name__ == "__main__":
    main()
