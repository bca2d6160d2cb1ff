"""supernet-measure: the latency of every operation of a space on a target, as a JSON table."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from latency.measure import measure
from latency.table import LatencyTable
from supernet_scripts.common import command, make_space, measure_space

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="measure")
@command
def main(cfg: DictConfig) -> None:
    data = instantiate(cfg.data)
    space = make_space(cfg, data)
    measured = measure_space(cfg, data, space, with_table=False)
    output = Path(cfg.output)
    table = None
    sites = measured.sites
    if output.exists():
        table = LatencyTable.load(output)
        name = measured.backend.describe()["device_name"]
        table.check_target(measured.target, name)
        missing = set(table.missing(site.key for site in sites))
        sites = [site for site in sites if site.key in missing]
    if not sites:
        log.info("%s has every operation of the space already", output)
        return
    fresh = measure(
        sites,
        measured.backend,
        measured.target,
        rounds=cfg.latency.rounds,
        warmup=cfg.latency.warmup,
        burst_ms=cfg.latency.burst_ms,
        progress_path=output.with_name(f"{output.name}.progress"),
    )
    if table is not None:
        fresh.measurements = {**table.measurements, **fresh.measurements}
    fresh.save(output)
    log.info("%d operations in %s", len(fresh.measurements), output)


if __name__ == "__main__":
    main()
