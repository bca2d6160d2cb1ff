"""NASNet (Zoph et al. 2018): a normal and a reduction cell of five blocks."""

from __future__ import annotations

from supernet.spaces.blocks import ADD, CONCAT, BlockSpace, identities


class NASNet(BlockSpace):
    """Thirteen operations, and blocks that add their two sides or put them side by side (section
    3): 2 x 5 x 5 predictions, (2 * 3 * 4 * 5 * 6)^4 * 13^20 * 2^10 = 5.2e36 architectures.

    Where two sides are put side by side, a 1x1 convolution brings them back to the width of a
    state, as "1x1 convolutions are inserted as necessary" for shapes to match (appendix A.4, which
    does not say where). The official code has no such blocks: the networks that were found add
    alone. There NASNet-A's normal cell has an input among the parts of its output; here, as the
    paper says, these are states that the cell makes.
    """

    operations = (
        "identity",
        "conv_1x3_3x1",
        "conv_1x7_7x1",
        "dil_conv_3x3",
        "avg_pool_3x3",
        "max_pool_3x3",
        "max_pool_5x5",
        "max_pool_7x7",
        "conv_1x1",
        "conv_3x3",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "sep_conv_7x7",
    )
    combinations = (ADD, CONCAT)
    skip_options = identities("identity")
