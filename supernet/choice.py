"""Choices, and the architecture that settles every one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import total_ordering
from typing import Any

import torch
from torch import Tensor, nn

from supernet.files import read_json, write_json

FORMAT = "supernet.architecture"
VERSION = 1


@dataclass(frozen=True, order=True)
class Choice:
    """One categorical decision of a space; options are names, in a fixed order.

    Attributes:
        absent: the option that stands for nothing at all: where it is chosen, nothing runs and
            nothing is paid. None where every option is an operation.
        into: the node that adds up what comes out here, as a choice among its inputs: its options
            are the names of all choices that go into it. It is none of the space's own. None where
            nothing is added up.
        implied: whether its option follows from those of other choices. Nothing decides it: it has
            no logits, and an architecture is complete without it (`SearchSpace.implied`).
        free: whether it costs nothing by itself: implied choices stand for all that its options
            cost together with others.
    """

    name: str
    options: tuple[str, ...]
    absent: str | None = None
    into: Choice | None = field(default=None, compare=False, repr=False)
    implied: bool = False
    free: bool = False

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"choice {self.name!r} has no options")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"choice {self.name!r} lists an option twice: {self.options}")
        for name in (self.name, *self.options):
            if not name or "." in name:
                raise ValueError(f"{name!r} cannot name a choice or an option: empty, or has a dot")
        if self.absent is not None:
            self.index(self.absent)
        if self.into is not None:
            self.into.index(self.name)

    def index(self, option: str) -> int:
        """Position of `option`.

        Raises:
            ValueError: unknown option.
        """
        if option not in self.options:
            raise ValueError(
                f"choice {self.name!r} has no option {option!r}; valid: {', '.join(self.options)}"
            )
        return self.options.index(option)


@total_ordering
@dataclass(frozen=True)
class Architecture:
    """One network of a space: frozen, hashable, ordered, and plain JSON on disk.

    It is the only thing handed from search to derivation, retraining, export and latency.

    Attributes:
        space: import path of the `SearchSpace` class.
        settings: the space's settings as canonical JSON text (so that the object stays hashable).
        options: one (choice, option) pair for every choice, in the space's order.
    """

    space: str
    settings: str
    options: tuple[tuple[str, str], ...]

    def __getitem__(self, choice: str) -> str:
        for name, option in self.options:
            if name == choice:
                return option
        raise KeyError(choice)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.options)

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Architecture):
            return NotImplemented
        return self._key() < other._key()

    def _key(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        return self.space, self.settings, self.options

    def __str__(self) -> str:
        return " ".join(f"{choice}={option}" for choice, option in self.options)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "space": self.space,
            "settings": json.loads(self.settings),
            "choices": dict(self.options),
        }

    @classmethod
    def from_dict(cls, value: Any) -> Architecture:
        """Read the dictionary form; `SearchSpace.of(architecture)` checks names against the space.

        Raises:
            ValueError: not an architecture, another format version, or a field of the wrong type.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise ValueError(f'not an architecture: the field "format" must be "{FORMAT}"')
        if value.get("version") != VERSION:
            raise ValueError(
                f"architecture format version {value.get('version')!r} is not supported; "
                f"this package reads version {VERSION}"
            )
        if unknown := sorted(set(value) - {"format", "version", "space", "settings", "choices"}):
            raise ValueError(f"an architecture has no field {', '.join(map(repr, unknown))}")
        space, settings, choices = (value.get(key) for key in ("space", "settings", "choices"))
        if not isinstance(space, str):
            raise ValueError(f'architecture field "space" must be text, not {space!r}')
        if not isinstance(settings, Mapping) or not isinstance(choices, Mapping):
            raise ValueError('architecture fields "settings" and "choices" must be objects')
        if bad := [pair for pair in choices.items() if not all(isinstance(x, str) for x in pair)]:
            raise ValueError(f"choices and options are names; got {bad[0]!r}")
        return cls(space, canonical_json(settings), tuple(choices.items()))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Architecture:
        """Read an `architecture.json`.

        Raises:
            ValueError: missing, truncated or foreign file; the message names the path.
        """
        value = read_json(path, "architecture")
        try:
            return cls.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None


class ArchitectureParameters(nn.Module):
    """The logits: one vector a choice, kept outside the supernet.

    Args:
        choices: the space's choices, then the nodes that have logits of their own.
        init_std: standard deviation of the normal the logits start from.
        generator: CPU generator that draws them (all processes pass the same seed).
        dtype: float32 for training; float64 for exact tests.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        init_std: float = 1e-3,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.logits = nn.ParameterDict(
            {
                choice.name: nn.Parameter(
                    init_std * torch.randn(len(choice.options), generator=generator, dtype=dtype)
                )
                for choice in choices
            }
        )

    def forward(self) -> dict[str, Tensor]:
        """The logits by choice name, each of shape (num_options,)."""
        return dict(self.logits.items())


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
