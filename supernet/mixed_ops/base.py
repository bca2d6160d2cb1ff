"""A searchable position, and the relaxation that says how its candidates are mixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from supernet.choice import Architecture, Choice

if TYPE_CHECKING:
    from supernet.space import SearchSpace


@dataclass(frozen=True)
class PathWeights:
    """What multiplies the candidates of one choice in one forward pass.

    Attributes:
        active: indices of the candidates that run; the others are not touched.
        values: shape (num_active,), one factor an active candidate; None is a factor of one each,
            which saves the multiplication and its memory.
    """

    active: tuple[int, ...]
    values: Tensor | None = None


Weights = Mapping[str, PathWeights]  # by the name of a choice or a node
Candidates = Mapping[str, Callable[[], nn.Module]]  # option -> builder of its module


class Scalable(dict[str, Callable[[], nn.Module]]):
    """Builders of the candidates of a position that keeps its number of channels: they can be built
    at another width, too.

    Args:
        at: from a width to its builders.
        width: of the position.
        stride: of the position.
    """

    def __init__(self, at: Callable[[int], Candidates], width: int, stride: int = 1) -> None:
        super().__init__(at(width))
        self.at, self.width, self.stride = at, width, stride


class Searchable(nn.Module):
    """A module that is called with `(x, weights)`; a fixed layer is called with `(x)`.

    Attributes:
        joint: whether candidates that read the same input are computed together
            (`supernet.joint`).
        drop_path_rate: of a derived network's paths in training, image by image; None where there
            are none to drop.
    """

    joint = False
    drop_path_rate: float | None = None

    def compact(self, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        """In a derived network: leave out what has no effect, share what is computed twice.

        Args:
            before, after: the blocks of the network around this one, where it is a block.
        """


def compact(network: nn.Module) -> None:
    """Have a derived network compute no more than it must, as `Searchable.compact` says."""
    blocks = [None, *getattr(network, "blocks", ()), None]
    for before, block, after in zip(blocks, blocks[1:], blocks[2:], strict=False):
        if isinstance(block, Searchable):
            block.compact(before, after)
    for module in network.modules():
        if isinstance(module, Searchable) and module not in blocks:
            module.compact()


class Parts(nn.Module):
    """A candidate whose children are measured one by one, since derived networks share some."""


class MixedOp(Searchable):
    """Candidates that read the same input: y = sum_i w_i o_i(x) over the active ones.

    Args:
        choice: names the weights of this position; positions may share a choice (tied cells).
        candidates: one module builder an option of the choice.

    Attributes:
        plain: whether it is this sum, so that it may be computed together with others.
    """

    plain: ClassVar[bool] = True

    def __init__(self, choice: Choice, candidates: Candidates) -> None:
        super().__init__()
        assert tuple(candidates) == choice.options, (choice, tuple(candidates))
        self.choice = choice
        self.candidates = nn.ModuleDict({name: build() for name, build in candidates.items()})

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Shapes: x is any input of the candidates, the result is their common output."""
        path = weights[self.choice.name]
        output = None
        for position, index in enumerate(path.active):
            term = self.candidates[self.choice.options[index]](x)
            if path.values is not None:
                term = path.values[position].to(term.dtype) * term
            output = term if output is None else output + term
        assert output is not None, f"no active candidate in choice {self.choice.name!r}"
        return output


class Elastic(Searchable):
    """Holds in its largest form the weights of a module whose shape depends on several choices, and
    runs the part that one option a choice leaves of it."""

    def state_of(self, options: Mapping[str, str]) -> dict[str, Tensor]:
        """The state of what stands in its place in a derived network.

        Args:
            options: {choice: option} of the architecture.
        """
        raise NotImplementedError

    def features_of(self, options: Mapping[str, str]) -> Sequence[int] | None:
        """Of the features before the classifier, those of the derived network; None, as by default,
        of a module that does not make these features."""
        return None


def are_plain(layers: Mapping[Any, nn.Module]) -> bool:
    """Whether all are mixed ops that do no more than weigh their candidates."""
    return all(isinstance(layer, MixedOp) and layer.plain for layer in layers.values())


def run_layer(layer: nn.Module, x: Tensor, weights: Weights | None) -> Tensor:
    """Call a fixed layer or a searchable one; `weights` is None in a derived network."""
    return layer(x, weights) if isinstance(layer, Searchable) else layer(x)


def only_options(choices: Sequence[Choice], weights: Weights) -> dict[str, str]:
    """The one active option of each choice.

    Raises:
        ValueError: the weights mix options.
    """
    options = {}
    for choice in choices:
        path = weights[choice.name]
        if len(path.active) != 1 or path.values is not None:
            raise ValueError(
                f"the supernet of this space runs one option a choice; {choice.name!r} mixes "
                f"{len(path.active)}: choose a strategy that tries architectures one by one"
            )
        options[choice.name] = choice.options[path.active[0]]
    return options


def one_hot(architecture: Architecture, choices: tuple[Choice, ...]) -> dict[str, PathWeights]:
    """Weights that run exactly the candidates of `architecture`."""
    return {
        choice.name: PathWeights((choice.index(architecture[choice.name]),)) for choice in choices
    }


@dataclass
class Sample:
    """One draw of a relaxation for an architecture step.

    Attributes:
        weights: for the supernet's forward pass, differentiable in the logits.
        cost_weights: by choice, shape (num_options,): probabilities for the cost term,
            differentiable where the relaxation lets the cost act.
        mass: what `Relaxation.after_step` needs to restore, by choice.
    """

    weights: dict[str, PathWeights]
    cost_weights: dict[str, Tensor]
    mass: dict[str, Tensor] = field(default_factory=dict)


class Relaxation(ABC):
    """How logits become weights. Nothing that changes from step to step is kept in it; randomness
    comes from `generator`, a CPU generator that is seeded alike in every process.

    Attributes:
        has_logits: whether there are logits to train.
        competing: whether options share one probability mass, softmax(logits).
        mixes_all: whether every candidate runs in every step, with weights that are a function of
            the logits alone.
        inheritable: whether candidates are those of a derived network, which can inherit their
            weights; otherwise it is judged as the supernet with one-hot weights.
    """

    has_logits: ClassVar[bool] = True
    competing: ClassVar[bool] = True
    mixes_all: ClassVar[bool] = False
    inheritable: ClassVar[bool] = True

    def build(self, choice: Choice, candidates: Candidates) -> MixedOp:
        """The module that stands at a searchable position."""
        return MixedOp(choice, candidates)

    def nodes(self, choices: Sequence[Choice]) -> tuple[Choice, ...]:
        """The nodes (`Choice.into`) whose inputs have logits, too; by default none. They come with
        the logits of choices, and weights and probabilities are made of both alike."""
        return ()

    def begin(self, space: SearchSpace) -> None:  # noqa: B027
        """Told once, before the first step, what is searched; by default of no use."""

    @abstractmethod
    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        """Weights of a weight step; nothing in them requires a gradient.

        Args:
            logits: by choice, shape (num_options,).
            progress: share of the weight steps already done, in [0, 1]: with logits of those after
                the warm-up, which is at 0.
        """

    @abstractmethod
    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        """Weights of an architecture step, differentiable in the logits.

        Args:
            logits, progress: as for a weight step.
        """

    def penalty(self, logits: Mapping[str, Tensor], progress: float) -> Tensor | float:
        """What an architecture step's loss adds for the logits' own sake; by default nothing."""
        return 0.0

    def after_step(self, logits: Mapping[str, Tensor], sample: Sample) -> None:  # noqa: B027
        """Correct the logits in place after the optimizer moved them; by default nothing."""

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Refuse an optimizer of the logits under which the rule is not exact.

        Raises:
            ValueError: says which setting and which value is needed.
        """

    def probabilities(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Selection probabilities by choice, shape (num_options,), for expectations and logs."""
        return {name: torch.softmax(vector, dim=-1) for name, vector in logits.items()}

    def scores(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Linear score of every option; derivation maximises their sum (log-probabilities)."""
        return {
            name: torch.log_softmax(vector.detach().double(), dim=-1)
            for name, vector in logits.items()
        }
