import pytest
import torch

from supernet.mixed_ops.one_shot import OneShot

LOGITS = {"a": torch.zeros(5), "b": torch.zeros(2)}
DRAWS = 4000


def kept_share(relaxation: OneShot, progress: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    counts = {name: 0 for name in LOGITS}
    for _ in range(DRAWS):
        for name, path in relaxation.for_weight_step(LOGITS, generator, progress).items():
            counts[name] += len(path.active)
    return {name: counts[name] / DRAWS / len(LOGITS[name]) for name in LOGITS}


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_drop_rate_grows_linearly(progress: float) -> None:
    """A path stays with 1 - r, or as the one drawn when all n would go (r^n, shared by n)."""
    rate = 0.6 * progress
    for name, share in kept_share(OneShot(0.6), progress).items():
        n = len(LOGITS[name])
        expected = 1 - rate + rate**n / n
        assert share == pytest.approx(expected, abs=4 * 0.5 / (DRAWS * n) ** 0.5)


def test_never_drops_every_path() -> None:
    generator = torch.Generator().manual_seed(0)
    relaxation = OneShot(0.99)
    survivors = [relaxation.for_weight_step(LOGITS, generator, 1.0)["b"] for _ in range(500)]
    assert all(path.active for path in survivors)
    assert {path.active for path in survivors} >= {(0,), (1,)}


def test_survivors_are_added_unweighted() -> None:
    paths = OneShot(0.5).for_weight_step(LOGITS, torch.Generator().manual_seed(1), 1.0)
    assert all(path.values is None for path in paths.values())


def test_has_no_logits() -> None:
    assert not OneShot.has_logits


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_refuses_a_rate_that_is_no_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=f"drop_rate.*got {rate}"):
        OneShot(rate)
