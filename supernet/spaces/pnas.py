"""PNAS (Liu et al. 2018): one cell of five blocks, with stride 1 and with stride 2."""

from __future__ import annotations

from supernet.spaces.blocks import BlockSpace, identities


class PNAS(BlockSpace):
    """Eight operations; the two sides of a block are added (section 3.1). Cells of stride 2 are the
    same as those of stride 1: (2 * 3 * 4 * 5 * 6)^2 * 8^10 = 5.6e14 architectures, of which many
    differ in the order of sides and blocks alone.
    """

    operations = (
        "sep_conv_3x3",
        "sep_conv_5x5",
        "sep_conv_7x7",
        "conv_1x7_7x1",
        "identity",
        "avg_pool_3x3",
        "max_pool_3x3",
        "dil_sep_conv_3x3",
    )
    kinds = ("cell",)
    skip_options = identities("identity")
