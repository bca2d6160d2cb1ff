import pytest
import torch

from latency.model import AdditiveCost
from supernet.limits import Limit, figure
from supernet.spaces.nasbench201 import NasBench201


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (0.123456789, "0.123457"), (999999.0, "999999"), (3211264, "3211264")],
)
def test_large_counts_keep_their_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_a_limit_holds_up_to_its_bound() -> None:
    space = NasBench201()
    vectors = {c.name: torch.zeros(5, dtype=torch.float64) for c in space.choices}
    cost = AdditiveCost(space.choices, 4.0, vectors, "macs", "MACs")
    architecture = space.architecture({c.name: "skip_connect" for c in space.choices})
    assert Limit(cost, 4.0).holds(architecture) and not Limit(cost, 3.999).holds(architecture)
    assert str(Limit(cost, 4e6)) == "macs <= 4000000 MACs"
