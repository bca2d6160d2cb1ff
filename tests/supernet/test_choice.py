from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from supernet.choice import Architecture, ArchitectureParameters, Choice, canonical_json

CHOICES = (Choice("kernel", ("three", "five")), Choice("depth", ("one", "two", "four")))


def architecture(kernel: str = "three", depth: str = "one", space: str = "a.B") -> Architecture:
    return Architecture(space, canonical_json({"x": 1}), (("kernel", kernel), ("depth", depth)))


def test_choice_knows_the_position_of_its_options() -> None:
    assert [CHOICES[1].index(option) for option in ("one", "two", "four")] == [0, 1, 2]


def test_choice_names_the_unknown_option_and_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="'depth' has no option 'three'; valid: one, two, four"):
        CHOICES[1].index("three")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a", (), "'a' has no options"),
        ("a", ("x", "x"), "lists an option twice"),
        ("a.b", ("x",), "'a.b' cannot name"),
        ("a", ("x.y",), "'x.y' cannot name"),
        ("", ("x",), "'' cannot name"),
    ],
)
def test_choice_refuses(name: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice(name, options)


def test_a_choice_goes_into_a_node_that_lists_it() -> None:
    """What it is a choice of stays the same."""
    node = Choice("sum", ("kernel", "other"))
    placed = dataclasses.replace(CHOICES[0], into=node)
    assert placed.into == node and placed.into.index(placed.name) == 0
    assert placed == CHOICES[0] and hash(placed) == hash(CHOICES[0])
    assert repr(placed) == repr(CHOICES[0]) and sorted([placed, CHOICES[1]])[0].name == "depth"
    with pytest.raises(ValueError, match="'sum' has no option 'depth'; valid: kernel, other"):
        dataclasses.replace(CHOICES[1], into=node)


def test_choices_and_architectures_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHOICES[0].name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture().space = "other"  # type: ignore[misc]


def test_architectures_are_values() -> None:
    assert architecture() == architecture()
    assert len({architecture(), architecture(), architecture("five")}) == 2
    assert architecture()["depth"] == "one"
    assert dict(architecture("five", "two")) == {"kernel": "five", "depth": "two"}
    assert str(architecture()) == "kernel=three depth=one"
    with pytest.raises(KeyError):
        architecture()["width"]


def test_architectures_have_one_total_order() -> None:
    every = [
        architecture(kernel, depth, space)
        for space in ("a.B", "a.C")
        for kernel in CHOICES[0].options
        for depth in CHOICES[1].options
    ]
    ordered = sorted(every)
    shuffled = list(every)
    random.shuffle(shuffled)
    assert sorted(shuffled) == ordered
    assert all(a < b and b > a and a <= b and a != b for a, b in zip(ordered, ordered[1:]))  # noqa: B905


def test_settings_do_not_depend_on_the_order_of_keys() -> None:
    value = architecture().to_dict()
    value["settings"] = {"b": 1, "a": [1, 2]}
    other = {**value, "settings": {"a": [1, 2], "b": 1}}
    assert hash(Architecture.from_dict(value)) == hash(Architecture.from_dict(other))


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    architecture("five", "four").save(path)
    assert Architecture.load(path) == architecture("five", "four")
    assert json.loads(path.read_text()) == {
        "format": "supernet.architecture",
        "version": 1,
        "space": "a.B",
        "settings": {"x": 1},
        "choices": {"kernel": "five", "depth": "four"},
    }
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ""] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, 'the field "format" must be'),
        ({"version": 2}, "version 2 is not supported; this package reads version 1"),
        ({"version": None}, "version None is not supported"),
        ({"extra": 1}, "has no field 'extra'"),
        ({"space": 3}, '"space" must be text, not 3'),
        ({"settings": [1]}, '"settings" and "choices" must be objects'),
        ({"choices": None}, '"settings" and "choices" must be objects'),
        ({"choices": {"kernel": 3}}, r"names; got \('kernel', 3\)"),
    ],
)
def test_a_malformed_architecture_is_refused_with_its_path(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**architecture().to_dict(), **change}))
    with pytest.raises(ValueError, match=message) as error:
        Architecture.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"format": "supernet.arch', b"\xff\xfe\x00", b"[1]"])
def test_corrupt_files_are_refused_with_their_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a") as error:
        Architecture.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no architecture at"):
        Architecture.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="is a folder"):
        Architecture.load(tmp_path)


def test_logits_are_one_vector_a_choice_and_repeat_with_the_seed() -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return ArchitectureParameters(CHOICES, 0.5, generator, torch.float64)()

    logits = draw(0)
    assert {name: vector.shape for name, vector in logits.items()} == {
        "kernel": (2,),
        "depth": (3,),
    }
    assert all(v.requires_grad and v.dtype == torch.float64 for v in logits.values())
    assert all(torch.equal(logits[name], draw(0)[name]) for name in logits)
    assert not torch.equal(logits["depth"], draw(1)["depth"])


def test_logits_start_with_the_standard_deviation_asked_for() -> None:
    wide = Choice("wide", tuple(f"o{i}" for i in range(20_000)))
    generator = torch.Generator().manual_seed(0)
    spread = ArchitectureParameters((wide,), 1e-3, generator)()["wide"].std().item()
    assert spread == pytest.approx(1e-3, rel=0.05)
