from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from supernet.estimators import from_scratch
from supernet.estimators.from_scratch import FromScratch
from supernet.recipe import Recipe
from supernet.strategies.base import Run

RECIPE = Recipe(epochs=1, batch_size=2)


@pytest.mark.parametrize(
    ("length", "steps"), [({"epochs": 0.5}, 4), ({"epochs": 2}, 14), ({"steps": 5}, 5)]
)
def test_a_part_of_an_epoch_is_rounded_up_to_steps(
    length: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = SimpleNamespace(steps_per_epoch=7)
    monkeypatch.setattr(from_scratch, "ShortTraining", lambda *_, **__: training)
    estimator = FromScratch(recipe=RECIPE, num_images=10, **length)
    estimator.prepare(SimpleNamespace(), Run.unwritten(), None)  # type: ignore[arg-type]
    assert estimator.num_steps == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set one of them, .* epochs=None, steps=None"),
        ({"epochs": 1, "steps": 1}, "set one of them"),
        ({"epochs": 0}, "estimator.epochs must be a number above 0; got 0"),
        ({"steps": 1, "num_images": 0}, "num_images must be a whole number above 0; got 0"),
    ],
)
def test_trainings_of_no_length_are_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"recipe": RECIPE, "num_images": 10, **changes}
    with pytest.raises(ValueError, match=message):
        FromScratch(**settings)
