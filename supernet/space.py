"""What can be built: the choices of a space, its validity rules and its network."""

from __future__ import annotations

import importlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supernet.choice import Architecture, Choice, canonical_json
from supernet.mixed_ops.base import Candidates, MixedOp
from supernet.network import Network

Select = Callable[[Choice, Candidates], nn.Module]
Way = tuple[tuple[str, str], ...]  # (choice, option) pairs


@dataclass(frozen=True)
class LinearConstraint:
    """lower <= sum of `terms[choice, option]` over the chosen options <= upper.

    The form an integer program takes; a term that is not listed counts zero.
    """

    terms: Mapping[tuple[str, str], float]
    lower: float = -math.inf
    upper: float = math.inf

    def holds(self, pairs: Iterable[tuple[str, str]]) -> bool:
        """Whether (choice, option) pairs meet it, an architecture's or any others."""
        total = sum(self.terms.get(pair, 0.0) for pair in pairs)
        return self.lower <= total <= self.upper


@dataclass(frozen=True)
class Diagram:
    """An architecture to draw: nodes are labels, edges are (source, target, label)."""

    nodes: tuple[str, ...]
    edges: tuple[tuple[int, int, str], ...]


class SearchSpace(ABC):
    """Base of all spaces. Subclasses pass their constructor's arguments on as `settings`.

    Args:
        choices: every decision of the space, in a fixed order.
        settings: JSON values from which `type(self)(**settings)` builds an equal space; they
            include `in_chans` and `img_size`, the input a derived network declares by default.
        constraints: which architectures are valid.

    Attributes:
        skip_options: options that compute nothing; their share is logged, of the choices that are
            not `Choice.absent`.
        none_options: of them, those that carry nothing.
        safeguards: bounds as for `at_most` that keep these from winning a derivation by logits,
            where budget and limits leave another way.
        additive: whether what an architecture costs is a sum over its choices.
        interchangeable: whether a candidate of one choice fits all candidates of the others, so
            that options can be mixed, and peak memory be bounded choice by choice.
        excluded: (choice, option) pairs that no valid architecture holds.
    """

    skip_options: ClassVar[frozenset[str]] = frozenset()
    none_options: ClassVar[frozenset[str]] = frozenset()
    safeguards: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool] = True
    interchangeable: ClassVar[bool] = True

    def __init__(
        self,
        choices: tuple[Choice, ...],
        settings: Mapping[str, Any],
        constraints: tuple[LinearConstraint, ...] = (),
    ) -> None:
        self.choices = choices
        self.settings = canonical_json(settings)
        self.constraints = constraints
        self.excluded: frozenset[tuple[str, str]] = frozenset()
        self.in_chans: int = settings["in_chans"]
        self.img_size: int = settings["img_size"]

    def to_string(self, architecture: Architecture) -> str:
        """The architecture in the notation of the space's benchmark table.

        Raises:
            ValueError: the space has none.
        """
        raise ValueError(f"{self.id} has no notation that a benchmark table could use")

    def from_string(self, text: str) -> Architecture:
        """The architecture that `to_string` writes so.

        Raises:
            ValueError: the space has no such notation, or the text is not in it.
        """
        raise ValueError(f"{self.id} has no notation that a benchmark table could use")

    def covering(self, num_classes: int) -> Sequence[Network]:
        """Derived networks that, compiled, run between them every operation that any of them runs.

        None where compiled networks run nothing but the candidates they were chosen from; a space
        overrides this where `Searchable.compact` makes other operations of them.
        """
        return ()

    def ends(self) -> Sequence[Architecture]:
        """Where costs are not additive: architectures whose costs frame those of all others,
        excluded candidates left out."""
        raise NotImplementedError

    @property
    def id(self) -> str:
        """Import path of the class: the same text as Hydra's `_target_`."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @property
    def size(self) -> int:
        """Number of architectures, valid or not."""
        return math.prod(len(choice.options) for choice in self.decided)

    @cached_property
    def decided(self) -> tuple[Choice, ...]:
        """The choices that do not follow from others."""
        return tuple(choice for choice in self.choices if not choice.implied)

    def implied(self, options: Mapping[str, str]) -> Mapping[str, str]:
        """Hook for spaces with implied choices: what these are, the others being settled.

        They make a cost additive that depends on several choices at once; constraints say the same
        to an integer program, and `shares` to an expectation.
        """
        return {}

    @abstractmethod
    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        """Build the network; `select` says what stands at each searchable position.

        Args:
            select: called with a choice and the builders of its candidates.
            num_classes: outputs of the classifier.
            search: the form that is trained with shared weights (some spaces drop the affine
                part of their batch norms there).
        """

    @abstractmethod
    def diagram(self, architecture: Architecture) -> Diagram:
        """The architecture as a small graph, for the report."""

    def build_supernet(self, num_classes: int, build: Select = MixedOp) -> Network:
        """The network that holds every candidate; call it as `supernet(x, weights)`."""
        return self.build(build, num_classes, search=True)

    def build_network(self, architecture: Architecture, num_classes: int) -> Network:
        """The plain network of one architecture; call it as `network(x)`.

        Raises:
            ValueError: the architecture is not of this space.
        """
        architecture = self.check(architecture)

        def select(choice: Choice, candidates: Candidates) -> nn.Module:
            return candidates[architecture[choice.name]]()

        return self.build(select, num_classes, search=False)

    def architecture(self, options: Mapping[str, str]) -> Architecture:
        """Settle every choice by name; those that are implied follow, whatever is given for them.

        Raises:
            ValueError: unknown or missing choices, or an unknown option, each by name.
        """
        names = [choice.name for choice in self.choices]
        if unknown := [name for name in options if name not in names]:
            raise ValueError(
                f"{self.id} has no choice {', '.join(map(repr, unknown))}; "
                f"valid: {', '.join(names)}"
            )
        if missing := [choice.name for choice in self.decided if choice.name not in options]:
            raise ValueError(f"no option given for choice {', '.join(map(repr, missing))}")
        for choice in self.decided:
            choice.index(options[choice.name])
        settled = {**options, **self.implied(options)}
        pairs = tuple((name, settled[name]) for name in names)
        return Architecture(self.id, self.settings, pairs)

    @cached_property
    def genes(self) -> tuple[Choice, ...]:
        """The decisions in the grain and in the order in which controllers predict them and
        mutations change them: by default the choices. Where an option says several things at once,
        such as an input and an operation, a space takes it apart here.
        """
        return self.decided

    @property
    def anchors(self) -> Mapping[str, str]:
        """Genes that say whether a layer reads an earlier one, with the first gene of the earlier
        one: a controller decides by its state there. Their second option joins the layers; those
        of one layer follow each other."""
        return {}

    def encode(self, architecture: Architecture) -> dict[str, str]:
        """Option by gene."""
        return {choice.name: architecture[choice.name] for choice in self.decided}

    def decode(self, genes: Mapping[str, str]) -> Architecture:
        """The architecture that genes stand for, valid or not.

        Raises:
            ValueError: unknown or missing genes, or an unknown option, each by name.
        """
        return self.architecture(genes)

    def check(self, architecture: Architecture) -> Architecture:
        """The same architecture with its choices in this space's order.

        Raises:
            ValueError: of another space or of other settings, with unknown names, or at odds with
                itself where choices imply others.
        """
        if architecture.space != self.id:
            raise ValueError(f"the architecture is of {architecture.space}, not of {self.id}")
        if architecture.settings != self.settings:
            theirs, ours = json.loads(architecture.settings), json.loads(self.settings)
            differ = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
            raise ValueError(
                f"the architecture was made with other settings of {self.id}: "
                + ", ".join(f"{k}={theirs.get(k)!r} instead of {ours.get(k)!r}" for k in differ)
            )
        found, said = self.architecture(dict(architecture)), dict(architecture)
        for name, option in found:
            if said.get(name, option) != option:
                raise ValueError(
                    f"choice {name!r} of the architecture is {said[name]!r}; with its other "
                    f"choices, it must be {option!r}: change it, or leave it out"
                )
        return found

    def exclude(self, patterns: Sequence[str]) -> None:
        """Take candidates out of what may be chosen, besides those already out.

        The supernet keeps them, so that its weights and logits fit whatever is excluded.

        Args:
            patterns: "choice=option"; with wildcards, such as "*=option" or "stage1_*=option", for
                every choice of such a name that has the option.

        Raises:
            ValueError: a pattern names no candidate, or a choice would be left without an option.
        """
        excluded = set(self.excluded)
        for pattern in patterns:
            excluded |= self._candidates_like(pattern)
        for choice in self.choices:
            if all((choice.name, option) in excluded for option in choice.options):
                raise ValueError(
                    f"exclude leaves choice {choice.name!r} without an option; "
                    f"keep one of {', '.join(choice.options)}"
                )
        self.excluded = frozenset(excluded)

    def at_most(self, patterns: Sequence[str]) -> None:
        """Bound how often candidates may be chosen, as P-DARTS does with skips (Chen et al. 2019,
        section 3.3), besides the constraints that there are.

        Args:
            patterns: "choice=option:number", the first part as for `exclude`.

        Raises:
            ValueError: a pattern names no candidate, or has no number.
        """
        added = []
        for pattern in patterns:
            candidates, colon, number = pattern.rpartition(":")
            if not colon or not number.isdecimal():
                raise ValueError(f"at_most={pattern!r} is not of the form choice=option:number")
            terms = dict.fromkeys(sorted(self._candidates_like(candidates, "at_most")), 1.0)
            added.append(LinearConstraint(terms, upper=float(number)))
        self.constraints += tuple(added)

    def _candidates_like(self, pattern: str, setting: str = "exclude") -> set[tuple[str, str]]:
        (name, equals, option), said = pattern.partition("="), f"{setting}={pattern!r}"
        if not equals:
            raise ValueError(f"{said} is not of the form choice=option or *=option")
        if name in self.by_name:
            self.by_name[name].index(option)
            return {(name, option)}
        named = [choice for choice in self.choices if fnmatchcase(choice.name, name)]
        if not named:
            raise ValueError(
                f"{said}: {self.id} has no choice {name!r}; valid: *, {', '.join(self.by_name)}"
            )
        found = {(choice.name, option) for choice in named if option in choice.options}
        if not found:
            options = sorted({option for choice in named for option in choice.options})
            raise ValueError(
                f"{said}: no choice has option {option!r}; valid: {', '.join(options)}"
            )
        return found

    def allowed(self, choice: Choice) -> tuple[str, ...]:
        """The options of a choice that are not excluded."""
        return tuple(o for o in choice.options if (choice.name, o) not in self.excluded)

    def is_valid(self, architecture: Architecture) -> bool:
        return self.excluded.isdisjoint(architecture) and all(
            constraint.holds(architecture) for constraint in self.constraints
        )

    def ways(self) -> Sequence[Sequence[Way]]:
        """The choices in groups, each with the ways to settle it: sampling draws one of each.

        By default a choice is a group, and its ways are the options that are not excluded. Where
        constraints leave few of all combinations, a space groups the choices that they tie
        together and lists the valid ways alone.
        """
        return [[((c.name, option),) for option in self.allowed(c)] for c in self.decided]

    def sample(self, generator: torch.Generator) -> Architecture:
        """Draw uniformly among the valid architectures (by rejection of what is not)."""
        groups = self.ways()
        while True:
            drawn = [g[int(torch.randint(len(g), (1,), generator=generator))] for g in groups]
            architecture = self.architecture(dict(chain.from_iterable(drawn)))
            if self.is_valid(architecture):
                return architecture

    def scores(self, option_scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Hook for spaces whose probabilities do not multiply: the linear score of each option."""
        return option_scores

    def shares(self, probabilities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Hook for spaces whose constraints tie choices together: how often a valid architecture
        has each option, differentiable; what is expected of its cost is the sum over these."""
        return probabilities

    @cached_property
    def by_name(self) -> dict[str, Choice]:
        return {choice.name: choice for choice in self.choices}

    def resettled(self, settings: Mapping[str, Any]) -> SearchSpace:
        """The space with other settings, without what `exclude` and `at_most` do."""
        return type(self)(**{**json.loads(self.settings), **settings})

    @staticmethod
    def resized(architecture: Architecture, settings: Mapping[str, Any]) -> Architecture:
        """The same options with other settings of the space, say more cells.

        Raises:
            ValueError: the space refuses the settings, or has other choices with them.
        """
        merged = canonical_json({**json.loads(architecture.settings), **settings})
        found = replace(architecture, settings=merged)
        return SearchSpace.of(found).check(found)

    @staticmethod
    def of(architecture: Architecture) -> SearchSpace:
        """Rebuild the space an architecture belongs to, and check the architecture against it.

        Raises:
            ValueError: the class cannot be imported, is no `SearchSpace`, or refuses the
                settings or the names.
        """
        module, _, name = architecture.space.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the architecture's space {architecture.space!r} cannot be imported ({error}); "
                "install the package that defines it"
            ) from None
        if not (isinstance(cls, type) and issubclass(cls, SearchSpace)):
            raise ValueError(f"{architecture.space!r} is not a SearchSpace")
        try:
            space: SearchSpace = cls(**json.loads(architecture.settings))
        except TypeError as error:
            raise ValueError(f"{architecture.space} refuses the settings: {error}") from None
        space.check(architecture)
        return space
