"""How the kernels are cut into tiles: a table of tuned entries, and a rule where it has none.

The table is data (`kernels/tuned/*.json`, and a user's file of the same form beside it): no kernel is timed while a
model runs, so nothing is decided under the capture of a CUDA graph, and the same shapes run the same way on the same
machine. A key names the architecture, the kernel, the width, the planes, the group size and the sizes; tokens are
rounded up to a power of two.
"""

from dataclasses import dataclass

MAX_FUSED_TOKENS = 256
"""Above it the weight is dequantized once and the vendor's product taken."""


@dataclass(frozen=True)
class MatmulConfig:
    """Tile sizes and launch options of `matmul_kernel`; `blocks` of 128 codes per iteration, `splits` of K."""

    block_n: int
    block_m: int
    blocks: int
    splits: int
    warps: int
    stages: int


def default_matmul(
    n_tokens: int, out_features: int, in_features: int, bits: int, group_size: int, n_processors: int
) -> MatmulConfig:
    """Tiles for a shape that the table does not hold.

    Args:
        n_tokens, out_features, in_features: sizes of the product.
        bits: width of a code.
        group_size: weights per group, 0 for one group per channel.
        n_processors: streaming multiprocessors of the GPU.

    Returns:
        A configuration whose programs fill the GPU about twice, if each then still has four iterations.
    """
    block_n = 128
    block_m = next((m for m in (16, 32) if n_tokens <= m), 64)
    # Two blocks of 8-bit codes need more registers than there are.
    blocks = 1 if group_size or bits == 8 else 2
    tiles = -(-out_features // block_n) * -(-n_tokens // block_m)
    iterations = in_features // (128 * blocks)
    splits = 1
    while splits < 16 and 2 * splits * tiles <= 2 * n_processors and 8 * splits <= iterations:
        splits *= 2
    return MatmulConfig(block_n, block_m, blocks, splits, 4, 4 if block_m < 64 else 3)
