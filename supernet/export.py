"""A derived network for others: as a stock timm EfficientNet, and as ONNX.

`export_timm` writes two files that load without this package:

    import json
    from safetensors.torch import load_file
    from timm.models.efficientnet import EfficientNet, decode_arch_def

    config = json.load(open("timm_model.json"))
    network = EfficientNet(decode_arch_def(config.pop("arch_def")), **config)
    network.load_state_dict(load_file("timm_model.safetensors"))
    network.eval()
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from supernet.choice import Architecture
from supernet.files import atomic_path, write_json
from supernet.mixed_ops.base import compact
from supernet.network import Network
from supernet.space import SearchSpace
from supernet.spaces.efficientnet_scaling import EfficientNetScaling
from supernet.spaces.mbconv import ZERO, MBConv

RENAMES = {  # our prefix -> timm's
    "stem.conv.": "conv_stem.",
    "stem.bn.": "bn1.",
    "final.conv.": "conv_head.",
    "final.bn.": "bn2.",
    "classifier.": "classifier.",
}


def export_timm(
    network: Network, architecture: Architecture, folder: str | os.PathLike[str]
) -> None:
    """Write `timm_model.json` and `timm_model.safetensors` (see the module's docstring).

    Args:
        network: of an MBConv architecture or of a scaled EfficientNet, with a stem of stride 2. The
            latter's stock form does not resize: it is meant for images of `network.img_size`.
        folder: made where missing.

    Raises:
        ValueError: timm's EfficientNet cannot express this architecture.
    """
    space = SearchSpace.of(architecture)
    if isinstance(space, MBConv):
        widths = [space.stem_chs, space.first_chs, *(width for width, _, _ in space.stages)]
        _check_expressible(space, widths, [stride for _, _, stride in space.stages])
        arch_def, places = _arch_def(space, architecture)
        renames = RENAMES | {f"blocks.{i}.": f"blocks.{place}." for i, place in places.items()}
    elif isinstance(space, EfficientNetScaling):
        arch_def, renames = space.arch_def(dict(architecture)), {**RENAMES, "blocks.": "blocks."}
        widths = [space.chs(chs, dict(architecture)) for chs in space.base_widths]
        _check_expressible(space, widths, [])
    else:
        raise ValueError(
            "only MBConv networks and scaled EfficientNets have a stock timm form, not those of "
            f"{space.id}; use export_onnx, or timm.create_model('supernet_derived', ...) with this "
            "package"
        )
    config = {
        "arch_def": arch_def,
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "in_chans": network.in_chans,
        "stem_size": widths[0],
        "act_layer": space.act,
        # timm dilates instead of striding beyond this
        "output_stride": max(32, network.feature_info[-1]["reduction"]),
        "global_pool": network.global_pool.pool_type,
    }
    with atomic_path(Path(folder) / "timm_model.safetensors") as temporary:
        save_file(_renamed(network.state_dict(), renames), temporary, metadata={"format": "pt"})
    write_json(Path(folder) / "timm_model.json", config)


def _check_expressible(
    space: MBConv | EfficientNetScaling, widths: Sequence[int], strides: Sequence[int]
) -> None:
    """Refuse what timm's EfficientNet would silently build otherwise."""
    if space.stem_stride != 2:
        raise ValueError(
            f"timm's EfficientNet has a stem of stride 2, this space one of {space.stem_stride}; "
            "use export_onnx instead"
        )
    if bad := [width for width in widths if width % 8]:
        raise ValueError(
            f"timm's EfficientNet rounds widths to multiples of 8, so {bad} cannot be exported; "
            "use export_onnx instead"
        )
    if bad := [stride for stride in strides if stride not in (1, 2)]:
        raise ValueError(f"timm's EfficientNet has strides of 1 and 2, not {bad}")


def _arch_def(space: MBConv, architecture: Architecture) -> tuple[list[list[str]], dict[int, str]]:
    """timm's block strings, and the place in timm's network of each of our blocks."""
    arch_def = [[f"ds_r1_k3_s1_c{space.first_chs}_noskip"]]
    places = {0: "0.0"}
    index = 1
    for stage, (width, layers, stride) in enumerate(space.stages, start=1):
        blocks: list[str] = []
        for layer in range(layers):
            option = architecture[f"stage{stage}_{layer}"]
            if option != ZERO:
                kernel, expansion = space.shapes[option]
                places[index] = f"{len(arch_def)}.{len(blocks)}"
                # timm strides in the first block of a stage only
                blocks.append(f"k{kernel}_s{stride}_e{expansion}_c{width}")
            index += 1
        if blocks:
            arch_def.append([f"ir_r{len(list(same))}_{block}" for block, same in groupby(blocks)])
    return arch_def, places


def _renamed(state: dict[str, Tensor], renames: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        (ours,) = (prefix for prefix in renames if key.startswith(prefix))
        renamed[renames[ours] + key.removeprefix(ours)] = value.detach().cpu().contiguous()
    return renamed


def export_onnx(
    network: Network,
    path: str | os.PathLike[str],
    *,
    batch: int | None = 1,
    resolution: int | None = None,
    opset: int = 18,
) -> None:
    """Write a network in evaluation mode as ONNX, input `images`, output `logits`, one file.

    Args:
        network: a derived network; left as it is.
        batch: images a call; None for any number.
        resolution: side of the images; by default the network's own.
        opset: of the ONNX operators.

    Raises:
        ValueError: the packages of the extra `onnx` are missing.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f"exporting ONNX needs {', '.join(missing)}: pip install 'supernet[onnx]'")
    side = resolution or network.img_size
    parameter = next(network.parameters())
    images = torch.zeros(batch or 2, network.in_chans, side, side).to(parameter)
    shapes: Any = None if batch else ({0: torch.export.Dim("batch")},)
    exported = copy.deepcopy(network).eval()
    compact(exported)
    for name in ("onnxscript", "onnx_ir"):  # they tell every rewriting of the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    program = torch.onnx.export(
        exported, (images,), dynamo=True, verbose=False, opset_version=opset,
        input_names=["images"], output_names=["logits"], dynamic_shapes=shapes,
    )  # fmt: skip
    assert program is not None
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
