import pytest
import torch
from torch import nn

from supernet.engine import Meter, check_optimizers, frozen, make_accelerator


def optimizers(weights, logits):
    return torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(logits, lr=0.1)


def test_optimizers_must_be_disjoint_and_exhaustive() -> None:
    supernet, parameters = nn.Linear(2, 2), nn.Linear(3, 1)
    check_optimizers(
        *optimizers(supernet.parameters(), parameters.parameters()), supernet, parameters
    )
    check_optimizers(
        optimizers(supernet.parameters(), [torch.ones(1)])[0], None, supernet, nn.Linear(1, 1)
    )
    with pytest.raises(ValueError, match="weight optimizer does not train bias"):
        check_optimizers(
            *optimizers([supernet.weight], parameters.parameters()), supernet, parameters
        )
    with pytest.raises(ValueError, match="weight optimizer holds parameters that are not its own"):
        both = [*supernet.parameters(), parameters.weight]
        check_optimizers(*optimizers(both, parameters.parameters()), supernet, parameters)
    with pytest.raises(ValueError, match="architecture optimizer does not train bias"):
        check_optimizers(
            *optimizers(supernet.parameters(), [parameters.weight]), supernet, parameters
        )


def test_frozen_restores_exactly_what_it_froze() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="boom"), frozen(module):
        assert not module.weight.requires_grad
        raise RuntimeError("boom")
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_meter_is_a_mean_over_images() -> None:
    accelerator = make_accelerator("no", "cpu")
    meter = Meter(accelerator.device)
    meter.add(torch.tensor(1.0), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    meter.add(torch.tensor(4.0), torch.eye(2), torch.tensor([1, 0]))
    assert meter.read(accelerator) == pytest.approx(((4 * 1 + 2 * 4) / 6, 100 * 3 / 6))


def test_the_jobs_of_a_sweep_may_differ_in_precision() -> None:
    assert make_accelerator("no", "cpu").mixed_precision == "no"
    assert make_accelerator("bf16", "cpu").mixed_precision == "bf16"
    assert make_accelerator("no", "cpu").mixed_precision == "no"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", "cpu"), "precision='fp8' is unknown; valid: no, bf16, fp16"),
        (("no", "tpu"), "device='tpu' is unknown; valid: auto, cpu"),
    ],
)
def test_unknown_settings_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_accelerator(*arguments)
