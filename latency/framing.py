"""Operations as they stand in a network: between layers that leave the data in the runtime's form.

A runtime that compiles graphs keeps activations in a layout (or in 8 bits) of its own from layer to
layer. An operation that is timed alone pays for the way there and back, several times its own work
where that is small. In a frame it does not: a convolution from one channel and an addition (which
no activation can be fused into) make its input, a global average pool takes its output, and what
the frame takes on its own is subtracted.
"""

from __future__ import annotations

from torch import Tensor, nn

from latency.samples import Operation

Shape = tuple[int, ...]


class Frame(nn.Module):
    """1x1 convolutions from one channel, one a distinct shape; the operation; average pools.

    Args:
        operation: called with one tensor an input shape; None for the frame alone.
        shapes: of its inputs, (N, C, H, W) each.
    """

    def __init__(self, operation: nn.Module | None, shapes: tuple[Shape, ...]) -> None:
        super().__init__()
        self.distinct = tuple(dict.fromkeys(shapes))
        self.places = [self.distinct.index(shape) for shape in shapes]
        self.openings = nn.ModuleList(nn.Conv2d(1, shape[1], 1) for shape in self.distinct)
        self.operation = operation
        self.closing = nn.AdaptiveAvgPool2d(1)

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """One (N, 1, H, W) a distinct shape -> (N, C', 1, 1) each."""
        made = [opening(x) for opening, x in zip(self.openings, images, strict=True)]
        made = [x + x for x in made]
        if self.operation is None:
            return tuple(self.closing(x) for x in made)
        return (self.closing(self.operation(*(made[place] for place in self.places))),)


def can_frame(input_shapes: tuple[Shape, ...], output_shape: Shape) -> bool:
    """Whether inputs and output are feature maps."""
    return all(len(shape) == 4 for shape in (*input_shapes, output_shape))


def framed(operation: Operation) -> Operation:
    """The operation in its frame."""
    frame = Frame(operation.module, operation.input_shapes)
    return Operation(frame, _image_shapes(frame), operation.where)


def frame_of(operation: Operation) -> tuple[str, Operation]:
    """Name and operation of the frame alone."""
    frame = Frame(None, operation.input_shapes)
    name = "frame of " + " ".join("x".join(map(str, shape)) for shape in frame.distinct)
    return name, Operation(frame, _image_shapes(frame), name)


def _image_shapes(frame: Frame) -> tuple[Shape, ...]:
    return tuple((shape[0], 1, *shape[2:]) for shape in frame.distinct)
