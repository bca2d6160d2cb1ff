"""supernet-compare: searches that try architectures side by side, or the spaces they sample."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from supernet.report.edf import write_edf
from supernet.report.page import percent
from supernet.report.progress import write_progress
from supernet_scripts.common import command


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="compare")
@command
def _main(cfg: DictConfig) -> None:
    if cfg.edf is not None:
        page, rows = write_edf(list(cfg.runs), cfg.edf, cfg.output)
        for row in rows:
            print(f"{row['name']}: n={row['n']}, median {row['quartiles'][1]:.6g}")
        print(f"report: {page}")
        return
    page, rows = write_progress(list(cfg.runs), cfg.output)
    for row in rows:
        spread = "" if row["std"] is None else f" ± {percent(row['std'])}"
        oracle = ", oracle" if row["oracle"] else ""
        print(
            f"{row['name']}: {percent(row['mean'])}{spread}{row['unit']} (n={row['n']}{oracle}) "
            f"after {row['evaluations']} evaluations, {row['seconds']:.3g} s"
        )
    print(f"report: {page}")


def main() -> None:
    _main()


if __name__ == "__main__":
    main()
