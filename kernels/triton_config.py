"""How the kernels are cut into tiles: a table of tuned entries, and a rule where it has none.

The table is data: what ships in `triton_tuned.json` beside this file, and over it a user's file of the same form, which
`vlmq.kernels.triton_tune.tune` writes. It is read once in a process. No kernel is timed while a model runs: nothing is
decided under the capture of a CUDA graph, and the same shapes run the same way. An entry is

    "sm_90 matmul bits=4 terms=1 group=128 out=4096 in=4096 tokens=16":
        [block_n, block_m, blocks, splits, warps, stages]

with the number of tokens rounded up to a power of two.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vlmq.formats import Format

SHIPPED = Path(__file__).with_name("triton_tuned.json")

MAX_FUSED_TOKENS = 256
"""Above it the weight is dequantized once and the vendor's product taken."""

_EXCEPTIONS = {
    ("sm_80", 4, 1, True, 16, 8, False): 64,
    ("sm_80", 4, 2, False, 32, 32, False): 128,
    ("sm_100", 2, 1, True, 64, 32, True): 32,
    ("sm_100", 2, 1, True, 0, 16, False): 128,
    ("sm_100", 2, 2, False, 0, 8, False): 128,
    ("sm_100", 4, 2, False, 0, 32, True): 128,
    ("sm_120", 1, 1, True, 0, 32, False): 64,
    ("sm_120", 1, 1, True, 16, 8, False): 64,
    ("sm_120", 1, 1, True, 128, 8, True): 128,
    ("sm_120", 2, 1, True, 16, 8, True): 128,
    ("sm_120", 2, 1, True, 32, 8, True): 128,
    ("sm_120", 2, 1, True, 64, 8, True): 128,
    ("sm_120", 2, 2, False, 64, 16, True): 32,
    ("sm_120", 2, 2, False, 128, 64, True): 128,
    ("sm_120", 3, 1, True, 16, 16, True): 128,
    ("sm_120", 4, 2, False, 0, 16, False): 32,
    ("sm_120", 4, 2, False, 0, 64, False): 128,
    ("sm_120", 4, 2, False, 64, 64, False): 32,
    ("sm_120", 4, 2, False, 64, 64, True): 128,
    ("sm_120", 8, 1, True, 0, 64, True): 32,
    ("sm_120", 8, 1, True, 64, 64, False): 128,
    ("sm_120", 8, 1, True, 64, 64, True): 128,
    ("sm_120", 8, 1, True, 128, 64, True): 128,
}
"""Outputs of a tile where ptxas spills a register or two of those of the rule, compiled with Triton 3.9; the keys are
(GPU, bits, terms, whether there are zero points, group size, tokens of a tile, whether the last block is shorter)."""

_JOINT_EXCEPTIONS = {
    ("sm_80", 1, 1, True, 64, 64, False): 32,
    ("sm_80", 2, 1, False, 0, 16, False): 64,
    ("sm_80", 2, 2, False, 16, 16, True): 32,
    ("sm_80", 2, 2, False, 16, 32, False): 32,
    ("sm_80", 2, 2, False, 32, 8, False): 32,
    ("sm_80", 3, 1, True, 0, 64, False): 64,
    ("sm_80", 3, 1, True, 16, 8, True): 32,
    ("sm_80", 4, 1, True, 0, 8, False): 64,
    ("sm_80", 4, 1, True, 16, 8, True): 32,
    ("sm_80", 4, 2, False, 64, 32, True): 32,
    ("sm_80", 8, 1, True, 16, 8, True): 32,
    ("sm_90", 1, 1, True, 0, 16, False): 64,
    ("sm_90", 2, 1, False, 0, 8, False): 64,
    ("sm_90", 2, 1, False, 16, 16, True): 128,
    ("sm_90", 2, 1, True, 16, 8, False): 64,
    ("sm_90", 2, 1, True, 32, 16, True): 32,
    ("sm_90", 4, 2, False, 16, 8, True): 32,
    ("sm_90", 8, 1, True, 0, 8, False): 64,
    ("sm_90", 8, 1, True, 0, 16, False): 64,
    ("sm_90", 8, 1, True, 16, 8, False): 64,
    ("sm_100", 2, 1, False, 0, 16, False): 64,
    ("sm_100", 2, 1, False, 32, 8, True): 32,
    ("sm_100", 2, 2, False, 0, 8, False): 64,
    ("sm_100", 3, 1, True, 64, 32, True): 32,
    ("sm_100", 4, 2, False, 32, 8, True): 32,
    ("sm_100", 8, 1, True, 0, 32, True): 64,
    ("sm_120", 2, 1, False, 0, 32, True): 64,
    ("sm_120", 2, 1, False, 32, 8, True): 32,
    ("sm_120", 2, 1, True, 0, 16, True): 32,
    ("sm_120", 2, 1, True, 16, 8, True): 64,
    ("sm_120", 4, 1, True, 32, 16, False): 64,
}
"""As `_EXCEPTIONS`, for several layers in one launch, with biases or without: a program knows a little more then."""

TENSOR_MEMORY = ("sm_100", "sm_101", "sm_103", "sm_110")


@dataclass(frozen=True)
class MatmulConfig:
    """Tile sizes and launch options of `matmul_kernel`; `blocks` of 128 codes per iteration, `splits` of K."""

    block_n: int
    block_m: int
    blocks: int
    splits: int
    warps: int
    stages: int


def matmul_key(
    arch: str, n_tokens: int, out_features: int, in_features: int, bits: int, n_terms: int, group_size: int
) -> str:
    """Name of a shape in the table; `arch` is sm_<compute capability>."""
    bucket = 1 << (n_tokens - 1).bit_length()
    sizes = f"out={out_features} in={in_features} tokens={bucket}"
    return f"{arch} matmul bits={bits} terms={n_terms} group={group_size} {sizes}"


@cache
def tuned_table() -> dict[str, MatmulConfig]:
    """Return the shipped entries, and over them the user's."""
    user = user_table()
    return read_table(SHIPPED) | (read_table(user) if user.exists() else {})


def user_table() -> Path:
    """Return the user's file of tuned entries, which need not exist."""
    return Path.home() / ".cache" / "vlmq" / "triton_tuned.json"


def read_table(path: Path) -> dict[str, MatmulConfig]:
    """Read a file of tuned entries.

    Raises:
        ValueError: the file is no object of lists of six positive integers.
    """
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no table of tuned kernels: {error}; delete it or tune again") from error
    for key, values in entries.items() if isinstance(entries, dict) else [("the file", entries)]:
        is_list = isinstance(values, list) and len(values) == 6
        if not is_list or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(
                f"{path}: {key} must be six positive integers, got {values!r}; delete it or tune again"
            )
    return {key: MatmulConfig(*values) for key, values in entries.items()}


def row_unit(in_features: int) -> int:
    """What a row's length is a multiple of, for the compiler: 128, or of a row with a shorter last block 16 or less.

    A length that is passed as a number it takes for aligned at multiples of 16 only, and reads rows of any other one
    value at a time: at 4104 inputs twice the instructions for 64 tokens.
    """
    return 128 if in_features % 128 == 0 else math.gcd(in_features, 16)


def default_matmul(
    arch: str,
    n_tokens: int,
    out_features: int,
    in_features: int,
    fmt: Format,
    group_size: int,
    n_processors: int,
    n_layers: int = 1,
) -> MatmulConfig:
    """Tiles for a shape that the table does not hold.

    Args:
        arch: sm_<compute capability>.
        n_tokens, out_features, in_features: sizes of the product; outputs of all layers that are launched together.
        fmt: format of the weight.
        group_size: weights per group, 0 for one group per channel.
        n_processors: streaming multiprocessors of the GPU.
        n_layers: layers that are launched together.

    Returns:
        A configuration with up to eight warps for each processor, if each program then still has four iterations.
    """
    block_m = next((m for m in (8, 16, 32) if n_tokens <= m), 64)
    block_n = _outputs_of_tile(arch, block_m, in_features, fmt, group_size, n_layers > 1)
    # For few tokens four warps would take the products of warp groups (sm_90) or of tensor memory (sm_100), which wait
    # or copy at each plane of codes: 1.3 to 2 times the instructions. For many, four have too few registers for 128
    # outputs but on sm_90; of 64 outputs eight would unpack each weight twice, as four would of 32.
    warps = (
        2 if block_m <= 16 or block_n == 32 else 4 if block_m == 32 or block_n < 128 or arch == "sm_90" else 8
    )
    if traps(arch, group_size):
        warps = 2
    # Two blocks of 8-bit codes, and two beside the code for a shorter last block, need more registers than there are.
    blocks = 1 if group_size or fmt.bits == 8 or in_features % 128 else 2
    tiles = -(-out_features // block_n) * -(-n_tokens // block_m)
    iterations = in_features // (128 * blocks)
    splits = 1
    while splits < 16 and 2 * splits * tiles * warps <= 8 * n_processors and 8 * splits <= iterations:
        splits *= 2
    return MatmulConfig(block_n, block_m, blocks, splits, warps, 4 if block_m < 64 else 3)


def traps(arch: str, group_size: int) -> bool:
    """Say whether products of four warps and more may not be taken: seen by compiling, with Triton 3.6 and 3.9.

    There they are products of tensor memory, and of small groups Triton makes a kernel of some that does nothing but
    trap. Two warps take the products of single warps everywhere.
    """
    return arch in TENSOR_MEMORY and 0 < group_size < 128


def _outputs_of_tile(
    arch: str, block_m: int, in_features: int, fmt: Format, group_size: int, is_joint: bool
) -> int:
    """As many outputs as spill no registers: found by compiling, not by timing.

    64 outputs take about a tenth more instructions for each weight than 128, and 32 a quarter more than 64.
    """
    has_tail = in_features % 128 != 0
    kernel = (arch, fmt.bits, fmt.n_terms, fmt.has_zero, group_size, block_m, has_tail)
    if is_joint and kernel in _JOINT_EXCEPTIONS:
        return _JOINT_EXCEPTIONS[kernel]
    if kernel in _EXCEPTIONS:
        return _EXCEPTIONS[kernel]
    if traps(arch, group_size) and (block_m == 64 or (block_m == 32 and fmt.n_terms > 1)):
        return 32
    if (
        (has_tail and group_size)
        or (block_m == 64 and 0 < group_size < 128)
        or (block_m > 16 and traps(arch, group_size))
    ):
        return 64
    if fmt.n_terms > 1:
        return 64 if block_m > 8 or group_size != 128 else 128
    is_full = fmt.bits == 2 and group_size == 0 and (fmt.has_zero or (arch == "sm_120" and block_m == 16))
    return 64 if is_full else 128
