"""From a supernet to a derived network: the weights of the chosen candidates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from supernet.mixed_ops.base import Elastic, MixedOp
from supernet.network import Network


def inherit_weights(supernet: Network, network: Network, choices: Mapping[str, str]) -> None:
    """Copy the chosen candidates' weights and buffers from a supernet into a derived network.

    Scales and shifts of batch norms that the supernet does without become 1 and 0.

    Args:
        supernet: with every candidate.
        network: built for the same space and classes.
        choices: {choice: option} of the architecture.

    Raises:
        ValueError: the two networks do not match; `network` is left as it was.
    """
    state = {**_plain_affine(network), **_chosen_state(supernet, choices)}
    own = network.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    reshaped = [
        f"{key} ({tuple(value.shape)} for {tuple(own[key].shape)})"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    for what, keys in (("lacks", missing), ("adds", unexpected), ("reshapes", reshaped)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"the supernet does not hold this network: it {what} {', '.join(keys[:3])}{more}; "
                "build both from one space, architecture and number of classes"
            )
    network.load_state_dict(state)


def _chosen_state(supernet: Network, choices: Mapping[str, str]) -> dict[str, Tensor]:
    """The supernet's state under the names of the derived network, other candidates left out."""
    chosen = {}
    for path, module in supernet.named_modules():
        if isinstance(module, MixedOp):
            if module.choice.name not in choices:
                raise ValueError(f"no option given for choice {module.choice.name!r}")
            option = choices[module.choice.name]
            module.choice.index(option)
            chosen[f"{path}.candidates."] = (f"{option}.", f"{path}.")
    state = {}
    for key, value in _settled(supernet, choices).items():
        before, mixed, after = key.partition(".candidates.")
        if mixed:
            option, path = chosen[before + mixed]
            if not after.startswith(option):
                continue
            key = path + after.removeprefix(option)
        state[key] = value
    return state


def _settled(supernet: Network, choices: Mapping[str, str]) -> dict[str, Tensor]:
    """The supernet's state, of what is elastic the part that the choices leave."""
    state = supernet.state_dict()
    for path, module in supernet.named_modules():
        if isinstance(module, Elastic):
            state = {k: v for k, v in state.items() if not k.startswith(f"{path}.")}
            state |= {f"{path}.{name}": value for name, value in module.state_of(choices).items()}
            features, weight = module.features_of(choices), state.get("classifier.weight")
            if features is not None and weight is not None:
                state["classifier.weight"] = weight[:, features]
    return state


def _plain_affine(network: nn.Module) -> dict[str, Tensor]:
    """Scale 1 and shift 0 for the batch norms, in case the supernet has none."""
    return {
        f"{path}.{name}": torch.full_like(parameter, value)
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
        for name, parameter, value in (("weight", module.weight, 1.0), ("bias", module.bias, 0.0))
    }
