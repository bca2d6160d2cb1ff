"""AmoebaNet (Real et al. 2019): a normal and a reduction cell of five pairwise combinations."""

from __future__ import annotations

from supernet.spaces.blocks import BlockSpace, identities


class AmoebaNet(BlockSpace):
    """Eight operations; the two sides of a pairwise combination are added (section 3.1):
    (2 * 3 * 4 * 5 * 6)^4 * 8^20 = 3.1e29 architectures.
    """

    operations = (
        "identity",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "sep_conv_7x7",
        "avg_pool_3x3",
        "max_pool_3x3",
        "dil_sep_conv_3x3",
        "conv_1x7_7x1",
    )
    skip_options = identities("identity")
