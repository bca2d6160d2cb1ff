from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

from supernet.choice import Architecture, Choice
from supernet.derive import check_space, derive
from supernet.network import Network
from supernet.space import Diagram, LinearConstraint, SearchSpace, Select
from supernet.spaces.darts import Darts
from supernet.spaces.efficientnet_scaling import EfficientNetScaling
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nas_rl import NasRL
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos


class Toy(SearchSpace):
    """Three choices; valid where at most four of `a`, at least one `on` in the others."""

    def __init__(self, in_chans: int = 3, img_size: int = 8, most: float = 4.0) -> None:
        sizes = {("size", option): float(option) for option in ("1", "4", "9")}
        on = {("left", "on"): 1.0, ("right", "on"): 1.0}
        super().__init__(
            choices=(
                Choice("size", ("1", "4", "9")),
                Choice("left", ("on", "off", "idle")),
                Choice("right", ("on", "off")),
            ),
            settings={"in_chans": in_chans, "img_size": img_size, "most": most},
            constraints=(LinearConstraint(sizes, upper=most), LinearConstraint(on, lower=1.0)),
        )

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        raise NotImplementedError

    def diagram(self, architecture: Architecture) -> Diagram:
        raise NotImplementedError


VALID = [
    (size, left, right)
    for size, left, right in itertools.product(("1", "4"), ("on", "off", "idle"), ("on", "off"))
    if left == "on" or right == "on"
]


def settle(space: SearchSpace, options: tuple[str, ...]) -> Architecture:
    names = [choice.name for choice in space.choices]
    return space.architecture(dict(zip(names, options, strict=True)))


def test_size_is_the_product_of_the_options() -> None:
    assert Toy().size == 3 * 3 * 2
    assert NasBench201().size == 5**6 == 15_625
    # two of 2, 3, 4 and 5 edges with seven operations each, for two cells
    assert Darts().size == ((1 * 3 * 6 * 10) * 7**8) ** 2
    # 21 blocks of 6 operations; those that change neither width nor resolution may be absent
    assert MBConv().size == 6**6 * 7**15


def test_constraints_hold_for_exactly_the_valid_architectures() -> None:
    space = Toy()
    every = itertools.product(*(choice.options for choice in space.choices))
    assert [o for o in every if space.is_valid(settle(space, o))] == VALID


def test_sampling_is_uniform_over_the_valid_architectures() -> None:
    space, generator = Toy(), torch.Generator().manual_seed(0)
    drawn = Counter(space.sample(generator) for _ in range(300 * len(VALID)))
    assert set(drawn) == {settle(space, options) for options in VALID}
    assert stats.chisquare(list(drawn.values())).pvalue > 0.01


def test_sampling_repeats_with_the_generator() -> None:
    space = MBConv()

    def draw(seed: int) -> list[Architecture]:
        generator = torch.Generator().manual_seed(seed)
        return [space.sample(generator) for _ in range(5)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_excluded_candidates_are_never_sampled_and_never_valid() -> None:
    space, generator = Toy(), torch.Generator().manual_seed(0)
    assert space.excluded == frozenset()
    space.exclude(["left=on"])
    space.exclude(["*=idle", "size=4"])
    assert space.excluded == {("left", "on"), ("left", "idle"), ("size", "4")}
    allowed = [space.allowed(choice) for choice in space.choices]
    assert allowed == [("1", "9"), ("off",), ("on", "off")]
    assert {space.sample(generator) for _ in range(50)} == {settle(space, ("1", "off", "on"))}
    every = itertools.product(*(choice.options for choice in space.choices))
    assert [o for o in every if space.is_valid(settle(space, o))] == [("1", "off", "on")]


def test_at_most_so_many_are_chosen() -> None:
    space = NasBench201()
    space.exclude(["*=none"])
    space.at_most(["*=skip_connect:2", "edge_0_*=avg_pool_3x3:1"])
    generator, skips, pools = torch.Generator().manual_seed(0), set(), set()
    for _ in range(200):
        drawn = dict(space.sample(generator))
        skips.add(list(drawn.values()).count("skip_connect"))
        pools.add([o for c, o in drawn.items() if c.startswith("edge_0")].count("avg_pool_3x3"))
    assert skips == {0, 1, 2} and pools == {0, 1}
    options = {choice.name: "skip_connect" for choice in space.choices}
    assert not space.is_valid(space.architecture(options))


def test_the_best_two_skips_are_kept() -> None:
    """Skips win everywhere, by more on later edges: all but the best two give way to the next."""
    space = NasBench201()
    space.exclude(["*=none"])
    space.at_most(["*=skip_connect:2"])
    scores = {}
    for number, choice in enumerate(space.choices):
        p = torch.tensor([9.0, 4.0 + number, 1.0, 3.0, 2.0], dtype=torch.float64)
        scores[choice.name] = torch.log(p / p.sum())
    found = derive(space, scores)
    kept = {"edge_1_3", "edge_2_3"}
    assert {c for c, option in found if option == "skip_connect"} == kept
    assert {option for c, option in found if c not in kept} == {"nor_conv_3x3"}


def test_wildcards_in_the_names_of_choices() -> None:
    space = NasBench201()
    space.exclude(["edge_*_3=none"])
    assert space.excluded == {(f"edge_{source}_3", "none") for source in range(3)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*=on", "at_most='\\*=on' is not of the form choice=option:number"),
        ("*=on:few", "at_most='\\*=on:few' is not of the form choice=option:number"),
        ("top*=on:1", "has no choice 'top\\*'; valid: \\*, size, left, right"),
        ("size=on:1", "'size' has no option 'on'; valid: 1, 4, 9"),
    ],
)
def test_what_cannot_be_bounded_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Toy().at_most([pattern])


def test_a_space_that_is_left_without_an_architecture_is_refused() -> None:
    space = Toy()
    space.at_most(["left=on:0", "right=on:0"])
    with pytest.raises(ValueError, match="no valid architecture; exclude fewer .* at_most"):
        check_space(space)
    check_space(Toy())


def test_sampling_does_not_starve_when_most_candidates_are_excluded() -> None:
    """Rejection would need 7^21 draws."""
    space = MBConv()
    others = ("k5_e3", "k7_e3", "k3_e6", "k5_e6", "k7_e6", "zero")
    space.exclude([f"*={option}" for option in others])
    (architecture,) = {space.sample(torch.Generator().manual_seed(seed)) for seed in range(3)}
    assert set(dict(architecture).values()) == {"k3_e3"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["left"], "'left' is not of the form choice=option"),
        (["top=on"], "has no choice 'top'; valid: \\*, size, left, right"),
        (["right=idle"], "'right' has no option 'idle'; valid: on, off"),
        (["*=sideways"], "no choice has option 'sideways'; valid: 1, 4, 9, idle, off, on"),
        (["*=on", "right=off"], "leaves choice 'right' without an option; keep one of on, off"),
    ],
)
def test_what_cannot_be_excluded_is_refused(patterns: list[str], message: str) -> None:
    space = Toy()
    with pytest.raises(ValueError, match=message):
        space.exclude(patterns)
    assert space.excluded == frozenset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "1", "left": "on", "right": "on", "top": "on"}, "no choice 'top'; valid: size,"),
        ({"size": "1", "left": "on"}, "no option given for choice 'right'"),
        (
            {"size": "1", "left": "on", "right": "idle"},
            "'right' has no option 'idle'; valid: on, off",
        ),
    ],
)
def test_unknown_and_missing_names_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Toy().architecture(options)


def test_choices_are_put_in_the_order_of_the_space() -> None:
    space = Toy()
    swapped = space.architecture({"right": "on", "size": "4", "left": "off"})
    assert swapped == settle(space, ("4", "off", "on"))
    written_otherwise = Architecture(swapped.space, swapped.settings, swapped.options[::-1])
    assert space.check(written_otherwise) == swapped


def test_architectures_of_other_spaces_and_settings_are_refused() -> None:
    architecture = settle(Toy(most=9), ("1", "on", "on"))
    with pytest.raises(ValueError, match="most=9 instead of 4.0"):
        Toy().check(architecture)
    with pytest.raises(ValueError, match="is of .*Toy, not of .*NasBench201"):
        NasBench201().check(architecture)


SPACES = [
    NasBench201(widths=(8, 16), num_cells=2), MBConv(kernels=(3,)), Darts(), Spos(), ENASMacro(),
    NasRL(), EfficientNetScaling(phi=2),
]  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
def test_a_space_is_rebuilt_from_its_architecture(space: SearchSpace) -> None:
    architecture = space.sample(torch.Generator().manual_seed(0))
    again = SearchSpace.of(Architecture.from_dict(architecture.to_dict()))
    assert type(again) is type(space)
    assert again.settings == space.settings
    assert again.choices == space.choices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": "absent_package.Space"}, "'absent_package.Space' cannot be imported"),
        ({"space": "supernet.spaces.nasbench201.Absent"}, "cannot be imported"),
        ({"space": "nodots"}, "cannot be imported"),
        ({"space": ".relative.Space"}, "cannot be imported"),
        ({"space": "supernet.choice.Choice"}, "is not a SearchSpace"),
        ({"settings": {"depth": 3}}, "refuses the settings: .*'depth'"),
        ({"choices": {"edge_9_9": "none"}}, "has no choice 'edge_9_9'"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(change: dict[str, Any], message: str) -> None:
    space = NasBench201()
    value = space.sample(torch.Generator().manual_seed(0)).to_dict()
    with pytest.raises(ValueError, match=message):
        SearchSpace.of(Architecture.from_dict({**value, **change}))
