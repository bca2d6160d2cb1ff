"""Seconds and peak memory of a search step, plain against grouped, of any space and mixed op.

    python scripts/benchmark_step.py space=nasbench201 mixed_op=softmax num_threads=1
    python scripts/benchmark_step.py space=mbconv data.img_size=224 strategy.batch_size=8

A step is a weight step and a first-order architecture step. *Plain*: every candidate is computed on
its own, channels first, in float32, and both halves make gradients of the weights. *Grouped* is the
search's own step. The forms take turns in one process, so that a change of the machine's speed
meets all; ratios are medians over the rounds, and CPU time is what a busy machine disturbs least.
Peak memory is that of a fresh process, less what it held after importing and making the data.
"""

from __future__ import annotations

import logging
import resource
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from latency.backends.base import cpu_name, torch_versions
from supernet.data import Data
from supernet.files import read_json, write_json
from supernet.strategies.first_order import FirstOrder
from supernet_scripts.common import command, set_up_cpu
from supernet_scripts.step_forms import FORMS, Stepper

log = logging.getLogger(__name__)

STEPS = ("both", "weights")


def make_data(cfg: DictConfig) -> Data:
    set_up_cpu(cfg)
    data: Data = instantiate(cfg.data)
    data.search_splits(cfg.seed)  # made now, and kept
    return data


def take_turns(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Seconds a step, by form."""
    data = make_data(cfg)
    steppers = {form: Stepper(cfg, data, form) for form in cfg.forms}
    for stepper in steppers.values():
        stepper()
    before = {form: stepper.waited() for form, stepper in steppers.items()}
    for _ in range(cfg.rounds):
        for stepper in steppers.values():
            stepper()
    rows = {}
    for form, stepper in steppers.items():
        seconds, cpu_seconds = stepper.seconds[1:], stepper.cpu_seconds[1:]
        rows[form] = {
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "median_cpu_s": statistics.median(cpu_seconds),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "wait_share": (stepper.waited() - before[form]) / sum(seconds),
        }
    return rows


def peak_mib() -> float:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage starts from what the parent process held
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def memory_here(cfg: DictConfig, form: str) -> float:
    """MiB that the form's steps need beyond imports and data, in this process."""
    data = make_data(cfg)
    before = peak_mib()
    stepper = Stepper(cfg, data, form)
    for _ in range(cfg.memory_rounds):
        stepper()
    if stepper.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib() - before


def memory(cfg: DictConfig, form: str) -> float:
    """The same in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(memory_here, cfg, form).result()


def is_bfloat16_native(on_gpu: bool) -> bool:
    """Whether the search's device computes in bfloat16 itself."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def setting(cfg: DictConfig) -> dict[str, Any]:
    """What tells one row from another."""
    chosen = HydraConfig.get().runtime.choices
    own = [o for o in HydraConfig.get().overrides.task if o.startswith("space.")]
    return {
        "space": " ".join([chosen["space"], *own]),
        "mixed_op": chosen["mixed_op"],
        "pixels": cfg.data.img_size,
        "batch": cfg.strategy.batch_size,
        "step": cfg.step,
        "threads": torch.get_num_threads(),
        "precision": "float32" if cfg.precision == "no" else cfg.precision,
    }


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: names the setting and its valid values.
    """
    if not cfg.forms or not set(cfg.forms) <= set(FORMS):
        raise ValueError(f"forms={list(cfg.forms)} must be some of {', '.join(FORMS)}")
    if cfg.step not in STEPS:
        raise ValueError(f"step={cfg.step!r} is unknown; valid: {', '.join(STEPS)}")
    if cfg.rounds < 1 or cfg.memory_rounds < 1:
        raise ValueError(f"rounds={cfg.rounds}, memory_rounds={cfg.memory_rounds}: at least 1 each")
    if get_class(cfg.strategy["_target_"]) is not FirstOrder:
        raise ValueError(
            f"strategy={cfg.strategy['_target_']!r}: first-order steps are measured; "
            "set strategy=first_order"
        )


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Set each form against the plain one, round by round."""
    for row in rows.values():
        if "plain" in rows:
            for name, kind in (("times_faster", "seconds"), ("times_less_cpu", "cpu_seconds")):
                pairs = zip(rows["plain"][kind], row[kind], strict=True)
                row[name] = statistics.median(one / other for one, other in pairs)
            if "peak_mib" in row:
                row["memory_share"] = row["peak_mib"] / rows["plain"]["peak_mib"]


COLUMNS = {
    "median_s": "{:.3f}",
    "min_s": "{:.3f}",
    "max_s": "{:.3f}",
    "median_cpu_s": "{:.3f}",
    "times_faster": "{:.2f}",
    "times_less_cpu": "{:.2f}",
    "peak_mib": "{:.0f}",
    "memory_share": "{:.0%}",
    "wait_share": "{:.1%}",
}


def table(entries: list[dict[str, Any]]) -> str:
    """All rows of a file for people; the ratios are to `plain`."""
    head = ["setting", "form", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in entries:
        words = [f"{value}" if isinstance(value, str) else f"{key} {value}"
                 for key, value in entry["setting"].items()]  # fmt: skip
        for form, row in entry["forms"].items():
            cells = [text.format(row[key]) if key in row else "" for key, text in COLUMNS.items()]
            lines.append("| " + " | ".join([", ".join(words), form, *cells]) + " |")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path="pkg://supernet_conf", config_name="benchmark_step")
@command
def main(cfg: DictConfig) -> None:
    check(cfg)
    on_gpu = cfg.device == "auto" and torch.cuda.is_available()
    native = is_bfloat16_native(on_gpu)
    if cfg.precision == "bf16" and not native:
        log.warning("bfloat16 is not native to this device: it is emulated, which is slow")
    rows = take_turns(cfg)
    for form in cfg.forms if cfg.memory else ():
        rows[form]["peak_mib"] = memory(cfg, form)
    compare(rows)
    gpu = {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    machine = {"cpu": cpu_name(), **gpu, **torch_versions(), "bfloat16_is_native": native}
    entry = {"setting": setting(cfg), "forms": rows, "machine": machine}
    output = Path(cfg.output)
    entries = read_json(output, "benchmark")["entries"] if output.exists() else []
    entries = [old for old in entries if old["setting"] != entry["setting"]] + [entry]
    write_json(output, {"entries": entries})
    print(table(entries))


if __name__ == "__main__":
    main()
