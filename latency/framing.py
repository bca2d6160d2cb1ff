"""Operations as they stand in a network: between layers that leave the data in the runtime's form.

A runtime that compiles graphs keeps activations in a layout (or in 8 bits) of its own from layer to
layer. An operation that is timed alone pays for the way there and back, several times its own work
where that is small. In a frame it does not: a convolution from one channel and an addition (which
no activation can be fused into) make each input, a global average pool takes the output, and what
the frame takes on its own is subtracted. Inputs are made one by one, since an operation may write
its result over an input that nothing else reads. The frame alone closes each of them, so all but
one of these closings are added again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from latency.samples import Operation

Shape = tuple[int, ...]


class Frame(nn.Module):
    """A 1x1 convolution from one channel for each input; the operation; an average pool.

    Args:
        operation: called with one tensor an input shape; None for the frame alone.
        shapes: of its inputs, (N, C, H, W) each.
        closings: of each output, 1 or 2.
    """

    def __init__(
        self, operation: nn.Module | None, shapes: Sequence[Shape], closings: int = 1
    ) -> None:
        super().__init__()
        self.openings = nn.ModuleList(nn.Conv2d(1, shape[1], 1) for shape in shapes)
        self.operation = operation
        # The second one differs in form, or the runtime would compute one alone.
        pools = [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d((shapes[0][2], shapes[0][3]))]
        self.closings = nn.ModuleList(pools[:closings])

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """One (N, 1, H, W) an input -> (N, C', 1, 1) an output and closing."""
        made = [opening(x) for opening, x in zip(self.openings, images, strict=True)]
        made = [x + x for x in made]
        outputs = made if self.operation is None else [self.operation(*made)]
        return tuple(closing(x) for x in outputs for closing in self.closings)


def can_frame(input_shapes: tuple[Shape, ...], output_shape: Shape) -> bool:
    """Whether inputs and output are feature maps."""
    return all(len(shape) == 4 for shape in (*input_shapes, output_shape))


def framed(operation: Operation) -> Operation:
    """The operation in its frame."""
    shapes = operation.input_shapes
    return Operation(Frame(operation.module, shapes), _image_shapes(shapes), operation.where)


def frame_of(shapes: Sequence[Shape], closings: int = 1) -> tuple[str, Operation]:
    """Name and operation of the frame alone, for inputs of these shapes."""
    name = "frame of " + " ".join("x".join(map(str, shape)) for shape in shapes)
    if closings > 1:
        name += " closed twice"
    return name, Operation(Frame(None, shapes, closings), _image_shapes(shapes), name)


def _image_shapes(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    return tuple((shape[0], 1, *shape[2:]) for shape in shapes)
