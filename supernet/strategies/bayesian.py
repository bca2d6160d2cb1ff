"""Bayesian optimisation by a sampler of Optuna (Akiba et al. 2019)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from supernet.choice import Architecture
from supernet.space import SearchSpace, Way
from supernet.strategies.base import Problem
from supernet.strategies.trials import Proposals, Trials
from supernet.strategies.variation import allowed_options, tied_groups

if TYPE_CHECKING:
    from optuna.trial import Trial as OptunaTrial

PATIENCE = 10


class Bayesian(Trials):
    """Asks the sampler for an architecture and tells it the reward.

    Each gene is a categorical parameter. Where the space's constraints tie choices together, the
    ways to settle such a group (`SearchSpace.ways`) are one parameter, so that what is asked for
    is valid. What is outside budget and limits is told as failed, and judged by nobody. After ten
    suggestions in a row that are out of bounds or known already, architectures are drawn at random
    until one is new.

    Args:
        sampler: name of a class of `optuna.samplers`.
        settings: its arguments, the seed aside.
        num_evaluations, seconds: as for all `Trials`.
    """

    def __init__(
        self,
        *,
        sampler: str,
        settings: Mapping[str, Any],
        num_evaluations: int | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(num_evaluations=num_evaluations, seconds=seconds)
        self.sampler, self.settings = sampler, dict(settings)

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        optuna = _import_optuna()
        seed = int(torch.randint(2**31, (1,), generator=generator))
        study = optuna.create_study(sampler=self._make(optuna, seed), direction="maximize")
        parameters, sampler = _Parameters(problem.space), problem.sampler()
        known: set[Architecture] = set()
        idle = 0  # suggestions in a row that brought nothing new
        while True:
            asked: list[tuple[OptunaTrial, Architecture]] = []
            while len(asked) < problem.accelerator.num_processes:
                if idle >= PATIENCE:
                    study.enqueue_trial(parameters.of(sampler.sample(generator)))
                trial = study.ask()
                architecture = parameters.suggest(trial)
                feasible = problem.is_feasible(architecture)
                idle = 0 if feasible and architecture not in known else idle + 1
                known.add(architecture)
                if feasible:
                    asked.append((trial, architecture))
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
            trials = yield [architecture for _, architecture in asked]
            for (trial, _), judged in zip(asked, trials, strict=True):
                study.tell(trial, judged.reward)

    def _make(self, optuna: Any, seed: int) -> Any:
        names = [name for name in optuna.samplers.__all__ if name.endswith("Sampler")]
        if self.sampler not in names or self.sampler == "BaseSampler":
            raise ValueError(
                f"strategy.sampler={self.sampler!r} is none of Optuna's samplers; valid: "
                + ", ".join(name for name in names if name != "BaseSampler")
            )
        try:
            return getattr(optuna.samplers, self.sampler)(seed=seed, **self.settings)
        except TypeError as error:
            raise ValueError(
                f"strategy.settings={self.settings} is refused by {self.sampler}: {error}; take a "
                "setting out with '~strategy.settings.NAME'"
            ) from error


def _import_optuna() -> Any:
    """Old and new versions alike, without what they say of themselves.

    Raises:
        ValueError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import optuna
        except ImportError:
            raise ValueError(
                "strategy=bayesian needs Optuna: pip install 'supernet[bayesian]'"
            ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


class _Parameters:
    """The genes of a space as categorical parameters, and groups of tied choices as one each."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.groups = tied_groups(space)
        tied = {name for group in self.groups for name, _ in group[0]}
        free = (gene for gene in space.genes if gene.name not in tied)
        self.genes = {gene.name: allowed_options(space, gene) for gene in free}

    def of(self, architecture: Architecture) -> dict[str, Any]:
        """The values that stand for an architecture."""
        genes, pairs = self.space.encode(architecture), set(architecture)
        found: dict[str, Any] = {name: genes[name] for name in self.genes}
        for group in self.groups:
            found[_name(group)] = next(n for n, way in enumerate(group) if pairs.issuperset(way))
        return found

    def suggest(self, trial: OptunaTrial) -> Architecture:
        genes = {n: str(trial.suggest_categorical(n, o)) for n, o in self.genes.items()}
        for group in self.groups:
            way: Any = trial.suggest_categorical(_name(group), list(range(len(group))))
            genes |= dict(group[way])
        return self.space.decode(genes)


def _name(group: Sequence[Way]) -> str:
    return " ".join(choice for choice, _ in group[0])
