"""supernet-validate: calibrate a latency table with whole networks, and report on other ones."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from latency.measure import cache_path, keep
from latency.validate import calibrate, describe, draw, measure_with_networks
from supernet.report import write_validation
from supernet_scripts.common import command, make_space
from supernet_scripts.measuring import check_table, measure_space


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="validate")
@command
def main(cfg: DictConfig) -> None:
    data = instantiate(cfg.data)
    space = make_space(cfg, data)
    check_table(space)
    measured = measure_space(cfg, data, space, with_table=cfg.latency.table is not None)
    fitted, held_out = draw(
        space, measured.sites, cfg.latency.num_fit, cfg.latency.num_held_out, cfg.seed
    )
    drawn, classes, output = [*fitted, *held_out], data.info.num_classes, Path(cfg.output)
    table = measured.table
    if table is not None:
        networks = measured.networks(space, drawn)
    else:
        table, networks = measure_with_networks(
            measured.needed,
            [space.build_network(architecture, classes) for architecture in drawn],
            measured.backend,
            measured.target,
            measured.network_plan,
            in_chans=space.in_chans,
            journal=output.with_name(f"{output.name}.progress"),
        )
    sites = [measured.sites_of(space, architecture) for architecture in drawn]
    calibration = calibrate(space, table, drawn, sites, networks, len(fitted))
    table.save(output)
    keep(cache_path(measured.backend, measured.target, cfg.latency.cache_dir), table)
    print(describe(calibration))
    report = write_validation(table, calibration, output.with_suffix(".html"))
    print(f"table: {output}\nreport: {report}")


if __name__ == "__main__":
    main()
