"""ENAS, micro search (Pham et al. 2018, section 2.4): two cells of five nodes."""

from __future__ import annotations

from supernet.spaces.blocks import BlockSpace, identities


class ENASMicro(BlockSpace):
    """Five operations; a node adds two of them: (2 * 3 * 4 * 5 * 6)^4 * 5^20 = 2.6e25
    architectures.

    As in the official code, inputs that no node reads are loose ends, too. There the search network
    differs from the final one: a 1x1 convolution after each cell and, for a reduction, a factorized
    one before a cell of stride 1. Here both are as the final network is.
    """

    operations = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "skip_connect")
    loose_inputs = True
    skip_options = identities("skip_connect")
