from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from supernet.choice import Architecture
from supernet.inherit import inherit_weights
from supernet.network import Network
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201


def small() -> tuple[MBConv, Architecture]:
    space = MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2), (24, 2, 2)], head_chs=32)
    return space, space.sample(torch.Generator().manual_seed(0))


def derive(space: SearchSpace, supernet: Network, architecture: Architecture) -> Network:
    network = space.build_network(architecture, supernet.num_classes)
    inherit_weights(supernet, network, dict(architecture))
    return network


def test_a_copy_does_not_share_memory_with_the_supernet() -> None:
    space, architecture = small()
    supernet = space.build_supernet(10)
    network = derive(space, supernet, architecture)
    ours = {value.data_ptr() for value in network.state_dict().values()}
    assert not ours & {value.data_ptr() for value in supernet.state_dict().values()}


def test_inheriting_replaces_scales_and_shifts_the_supernet_lacks(
    unsettle: Callable[[nn.Module], nn.Module],
) -> None:
    space = NasBench201(widths=(4, 8), num_cells=1)
    architecture = space.architecture({c.name: "nor_conv_3x3" for c in space.choices})
    supernet = space.build_supernet(10)
    used = unsettle(space.build_network(architecture, 10))
    inherit_weights(supernet, used, dict(architecture))
    fresh = derive(space, supernet, architecture).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in used.state_dict().items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2), (24, 1, 2)], head_chs=32), "adds"),
        (MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2), (24, 3, 2)], head_chs=32), "lacks"),
        (MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2), (32, 2, 2)], head_chs=32), "reshapes"),
    ],
)
def test_another_network_is_refused_and_left_alone(other: MBConv, message: str) -> None:
    space, _ = small()
    architecture = other.architecture({c.name: "k3_e3" for c in other.choices})
    network = other.build_network(architecture, 10)
    before = copy.deepcopy(network.state_dict())
    choices = {choice.name: "k3_e3" for choice in space.choices}
    with pytest.raises(ValueError, match=f"does not hold this network: it {message} blocks"):
        inherit_weights(space.build_supernet(10), network, choices)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_number_of_classes_is_refused() -> None:
    space, architecture = small()
    network = space.build_network(architecture, 7)
    with pytest.raises(ValueError, match=r"reshapes classifier.weight \(\(10, 32\) for \(7, 32\)"):
        inherit_weights(space.build_supernet(10), network, dict(architecture))


def test_incomplete_and_unknown_choices_are_refused() -> None:
    space, architecture = small()
    network, supernet = space.build_network(architecture, 10), space.build_supernet(10)
    with pytest.raises(ValueError, match="no option given for choice 'stage1_0'"):
        inherit_weights(supernet, network, {})
    with pytest.raises(ValueError, match="'stage1_0' has no option 'k9_e9'"):
        inherit_weights(supernet, network, {**dict(architecture), "stage1_0": "k9_e9"})
