"""A search space: a chain of layers, each a convolution, a dilated one or a skip."""

from functools import partial

from torch import Tensor, nn

from supernet.choice import Architecture, Choice
from supernet.network import Block, Network
from supernet.space import Diagram, LinearConstraint, SearchSpace, Select


class ConvLayer(nn.Module):
    """The operation: convolution, norm, activation, with a residual connection."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Chain(SearchSpace):
    skip_options = frozenset({"skip"})

    def __init__(self, *, in_chans: int, img_size: int, width: int = 16, depth: int = 4) -> None:
        choices = tuple(Choice(f"layer_{i}", ("conv", "dilated", "skip")) for i in range(depth))
        skips = {(choice.name, "skip"): 1.0 for choice in choices}
        settings = {"in_chans": in_chans, "img_size": img_size, "width": width, "depth": depth}
        # valid architectures have at least one layer that is no skip
        super().__init__(choices, settings, (LinearConstraint(skips, upper=depth - 1),))
        self.width = width

    def build(self, select: Select, num_classes: int, search: bool) -> Network:
        width = self.width
        candidates = {
            "conv": partial(ConvLayer, width, 1),
            "dilated": partial(ConvLayer, width, 2),
            "skip": nn.Identity,
        }
        blocks = [Block(select(choice, candidates), width, 1) for choice in self.choices]
        return Network(
            stem=nn.Conv2d(self.in_chans, width, 3, stride=2, padding=1), stem_stride=2,
            blocks=blocks, final=nn.BatchNorm2d(width), num_features=width,
            num_classes=num_classes, in_chans=self.in_chans, img_size=self.img_size,
        )  # fmt: skip

    def diagram(self, architecture: Architecture) -> Diagram:
        nodes = ("image", *(option for _, option in architecture), "classifier")
        return Diagram(nodes, tuple((i, i + 1, "") for i in range(len(nodes) - 1)))
