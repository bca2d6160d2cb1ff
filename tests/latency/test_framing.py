from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from latency.framing import Frame, can_frame, frame_of, framed
from latency.samples import Operation

IMAGE, VECTOR = (2, 4, 6, 6), (2, 4)


class Join(nn.Module):
    """a - 2 b + 3 c, of a smaller side."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a - 2 * b + 3 * c)[:, :, 1:, 1:]


def test_a_framed_operation_is_the_operation_between_other_layers() -> None:
    conv = nn.Conv2d(4, 5, 3)
    operation = framed(Operation(conv, (IMAGE,), "a=b"))
    assert operation.input_shapes == ((2, 1, 6, 6),)
    assert operation.where == "a=b"
    frame = operation.module
    assert isinstance(frame, Frame) and frame.operation is conv
    image = torch.randn(2, 1, 6, 6)
    (opening,) = frame.openings
    weight, bias = opening.weight, opening.bias
    assert weight.shape == (4, 1, 1, 1)
    made = 2 * (image * weight.view(1, 4, 1, 1) + bias.view(1, 4, 1, 1))
    (found,) = frame(image)
    torch.testing.assert_close(found, conv(made).mean(dim=(2, 3), keepdim=True))


def test_every_input_is_made_on_its_own() -> None:
    small = (2, 4, 1, 1)
    operation = framed(Operation(Join(), (IMAGE, small, IMAGE), "a=b"))
    assert operation.input_shapes == ((2, 1, 6, 6), (2, 1, 1, 1), (2, 1, 6, 6))
    frame = operation.module
    assert isinstance(frame, Frame)
    images = [torch.randn(shape) for shape in operation.input_shapes]
    made = [2 * opening(x) for opening, x in zip(frame.openings, images, strict=True)]
    (found,) = frame(*images)
    torch.testing.assert_close(found, Join()(*made).mean(dim=(2, 3), keepdim=True))


@pytest.mark.parametrize("closings", [1, 2])
def test_the_frame_alone(closings: int) -> None:
    shapes = (IMAGE, (2, 4, 6, 6)) if closings == 2 else (IMAGE, (2, 4, 1, 1), IMAGE)
    name, alone = frame_of(shapes, closings)
    assert name.startswith("frame of 2x4x6x6 2x4x") and ("twice" in name) == (closings == 2)
    assert alone.input_shapes == framed(Operation(Join(), shapes, "x")).input_shapes
    images = [torch.randn(shape) for shape in alone.input_shapes]
    found = alone.module(*images)
    assert isinstance(alone.module, Frame)
    expected = [
        (2 * opening(x)).mean(dim=(2, 3), keepdim=True)
        for opening, x in zip(alone.module.openings, images, strict=True)
        for _ in range(closings)
    ]
    torch.testing.assert_close(found, tuple(expected))


@pytest.mark.parametrize(
    ("inputs", "output", "expected"),
    [
        ((IMAGE,), IMAGE, True),
        ((IMAGE, IMAGE), (2, 4, 1, 1), True),
        ((IMAGE,), VECTOR, False),
        ((VECTOR,), VECTOR, False),
        ((IMAGE, VECTOR), IMAGE, False),
    ],
)
def test_feature_maps_can_be_framed(
    inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...], expected: bool
) -> None:
    assert can_frame(inputs, output) is expected
