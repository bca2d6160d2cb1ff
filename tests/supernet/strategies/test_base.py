from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from supernet.spaces.mnasnet import MnasNet
from supernet.spaces.nas_rl import NasRL
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.random_search import RandomSearch


def test_strategies_that_need_sums_refuse_costs_that_are_none(
    make_strategy: Callable[..., Any],
) -> None:
    strategy = make_strategy()
    strategy.check_space(NasBench201())
    with pytest.raises(ValueError, match="FirstOrder needs the expected cost .*strategy=random"):
        strategy.check_space(NasRL())
    RandomSearch(num_evaluations=1).check_space(NasRL())


def test_strategies_that_mix_refuse_candidates_that_do_not_fit_each_other(
    make_strategy: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match="FirstOrder mixes options, .*MnasNet runs one a choice"):
        make_strategy().check_space(MnasNet())
    RandomSearch(num_evaluations=1).check_space(MnasNet())
