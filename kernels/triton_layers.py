"""Several layers in one launch of a kernel: arguments are tuples with an entry for each, and a program picks its own.

The tiles of all layers are numbered through. Pointers are chosen by conditions on numbers that a whole program shares,
which costs a few instructions before its loop; with one layer nothing is left of it.
"""

import triton
import triton.language as tl


@triton.jit
def layer_of(tile, N, BLOCK_N: tl.constexpr):
    """Layer of a tile, the tile within it, its rows, and the rows of the layers before; N holds the rows of each."""
    layer = 0
    n_before = 0
    n_rows = N[0]
    for i in tl.static_range(1, len(N)):
        n_tiles = tl.cdiv(n_rows, BLOCK_N)
        if tile >= n_tiles:
            tile -= n_tiles
            n_before += n_rows
            n_rows = N[i]
            layer = i
    return layer, tile, n_rows, n_before


@triton.jit
def one_of(values, layer):
    """The entry of a tuple of pointers of one type."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        if layer == i:
            value = values[i]
    return value


@triton.jit
def total_of(N):
    """Rows of all layers."""
    total = N[0]
    for i in tl.static_range(1, len(N)):
        total += N[i]
    return total
