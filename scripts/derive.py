"""supernet-derive: from a run folder to architecture.json, ONNX and stock timm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.data import Data
from supernet.derive import Infeasible, derive, reachable
from supernet.export import export_onnx, export_timm
from supernet.limits import Limit
from supernet.network import Network, inherit_weights
from supernet.space import SearchSpace
from supernet.weights_file import load_network
from supernet_scripts.common import (
    command,
    make_objective,
    make_space,
    measure_run,
    merged,
    run_config,
)

log = logging.getLogger(__name__)


def derive_run(
    cfg: DictConfig, run_cfg: DictConfig, data: Data, state: dict[str, Any]
) -> Architecture:
    """The best architecture of a search under the search's budget or another."""
    space = make_space(run_cfg, data)
    measured = measure_run(run_cfg, Path(cfg.run), data, space)
    settings = {"budget_ms": cfg.budget_ms, "budget": cfg.budget}
    if any(value is not None for value in settings.values()):
        settings["budget_share"] = None
        run_cfg = merged(run_cfg, {"objective": settings})
    objective = make_objective(run_cfg)
    cost = measured.cost(space, objective.cost)
    limits = measured.limits(space, objective)
    objective.prepare(reachable(space, cost), cost.unit)
    relaxation = instantiate(run_cfg.mixed_op)
    if relaxation.has_logits:
        logits = {n: state["logits"][f"logits.{n}"] for n in space.by_name}
        found = derive(space, relaxation.scores(logits), cost, objective.budget, limits)
    else:
        found = _best_ranked(state["ranked"], space, objective.budget, limits)
    for each in (cost, *(limit.cost for limit in limits)):
        log.info("%s %.6g %s", each.name, each.of(found), each.unit)
    log.info("derived: %s", found)
    return found


def _best_ranked(
    ranked: list[dict[str, Any]],
    space: SearchSpace,
    budget: float | None,
    limits: Sequence[Limit],
) -> Architecture:
    within = [
        r
        for r in ranked
        if (budget is None or r["cost"] <= budget)
        and all(limit.holds(space.architecture(r["architecture"])) for limit in limits)
    ]
    if not within:
        meets = " and ".join(["", *map(str, limits)])
        raise Infeasible(
            f"none of the {len(ranked)} ranked architectures costs at most {budget}{meets}; the "
            f"cheapest costs {min(r['cost'] for r in ranked):.6g}"
        )
    best = min(within, key=lambda r: (r["rank_value"], r["loss"], r["candidate"]))
    return space.architecture(best["architecture"])


def _network(
    cfg: DictConfig, found: Architecture, num_classes: int, supernet_state: Any
) -> Network:
    """With retrained weights where they are given, else with the supernet's."""
    if cfg.weights is not None:
        network, meta = load_network(cfg.weights)
        if Architecture.from_dict(meta["architecture"]) != found:
            raise ValueError(f"{cfg.weights} holds another architecture than the derived one")
        return network
    space = SearchSpace.of(found)
    supernet = space.build_supernet(num_classes)
    supernet.load_state_dict(supernet_state)
    network = space.build_network(found, num_classes)
    inherit_weights(supernet, network, dict(found))
    return network


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="derive")
@command
def main(cfg: DictConfig) -> None:
    run = Path(cfg.run)
    run_cfg = run_config(run)
    folder = run if cfg.output is None else Path(cfg.output)
    data: Data = instantiate(run_cfg.data)
    state = load_checkpoint(run / "checkpoint" / "search.safetensors")["search"]
    found = derive_run(cfg, run_cfg, data, state)
    found.save(folder / "architecture.json")
    written = [folder / "architecture.json"]
    if cfg.onnx or cfg.timm:
        network = _network(cfg, found, data.info.num_classes, state["supernet"]).eval()
        if cfg.onnx:
            written.append(folder / "network.onnx")
            export_onnx(network, written[-1])
        if cfg.timm:
            export_timm(network, found, folder)
            written.append(folder / "timm_model.safetensors")
    print("\n".join(f"wrote {path}" for path in written))


if __name__ == "__main__":
    main()
