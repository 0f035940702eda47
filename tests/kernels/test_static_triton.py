"""What the kernels compile to, without a GPU: no spills, tensor cores, few instructions per weight.

Compiled are the tiles that the rule gives (`default_matmul`). Instructions are counted in one iteration of the main
loop, per lane and weight of the thread block. Counts, not times. At 2.6 (int4) and 2.0 (2 bits) issuing instructions
takes about as long as reading the weights on an H200; the budgets hold what is reached, with a little room.
"""

import re

import pytest
from triton_static import DTYPES, SHARED_LIMIT, MachineCode, compile_kernel, kernel_format, skip_without_tools

from vlmq.formats import get_format
from vlmq.kernels.triton_config import default_matmul, row_unit
from vlmq.kernels.triton_dequant import dequantize_kernel, dequantize_rows
from vlmq.kernels.triton_matmul import matmul_kernel, reduce_kernel

pytestmark = pytest.mark.usefixtures("_tools")

ARCHS = [80, 90, 100, 120]

# (format, group size, most instructions per weight for one token)
DECODE = [
    ("int4", 128, 1.9),
    ("int4-sym", 0, 1.6),
    ("int2", 128, 1.85),
    ("ternary", 128, 1.75),
    ("ternary", 0, 1.5),
    ("binary", 128, 1.9),
    ("binary", 0, 1.5),
    ("int8", 128, 2.1),
    ("int3", 128, 3.0),
    ("ternary2", 128, 4.8),
    ("binary2", 128, 3.0),
]


@pytest.fixture(scope="module")
def _tools():
    skip_without_tools()


def compile_matmul(
    name, group_size, arch, *, n_tokens=1, dtype="bf16", tail=False, in_features=None, layers=1, bias=None
) -> tuple[MachineCode, float]:
    """Machine code, and weights that a thread takes in one iteration of its main loop."""
    fmt = get_format(name)
    in_features = in_features or 4096 + 16 * tail
    tiles = default_matmul(f"sm_{arch}", n_tokens, 4096, in_features, fmt, group_size, 132, layers)
    code = compile_kernel(
        matmul_kernel,
        arch,
        {
            "p_x": f"*{dtype}",
            "p_weight": "*u16",
            "p_scales": "*fp16",
            "p_zeros": "*u8" if fmt.has_zero else None,
            "p_bias": bias,
            "p_y": "*fp32",
        },
        {
            "UNIT": 16,
            "FORMAT": kernel_format(name),
            "GROUP": group_size,
            "BLOCK_N": tiles.block_n,
            "BLOCK_M": tiles.block_m,
            "BLOCKS": tiles.blocks,
            "K_UNIT": row_unit(in_features),
            "COMPUTE": DTYPES[dtype],
            "ASM": True,
        },
        layers=layers,
        warps=tiles.warps,
        stages=tiles.stages,
        unaligned=("K",) if in_features % 16 else (),
    )
    return code, tiles.block_n * 128 * tiles.blocks / (tiles.warps * 32)


def check(code: MachineCode, arch: int) -> None:
    assert code.stack_bytes == 0
    assert code.shared_bytes <= SHARED_LIMIT[arch]


def n_products(code: MachineCode) -> int:
    """Tensor-core instructions of the main loop: of warps, of warp groups (sm_90), of tensor memory (sm_100)."""
    return code.loop["HMMA"] + code.loop["HGMMA"] + code.loop["UTCHMMA"]


@pytest.mark.parametrize(("name", "group_size", "budget"), DECODE)
def test_decode_keeps_to_its_budget(name, group_size, budget):
    code, n_weights = compile_matmul(name, group_size, 90)
    check(code, 90)
    assert n_products(code) > 0
    assert code.loop.total() / n_weights <= budget
    # Weights go to the products in registers: of what a thread computes, only scales and zero points of a group pass
    # through shared memory, and a plane of codes would be 32 stores.
    assert code.loop["STS"] <= 4


@pytest.mark.parametrize("arch", [80, 100, 120])
@pytest.mark.parametrize(("name", "group_size", "budget"), [DECODE[0], DECODE[4], DECODE[5]])
def test_decode_keeps_to_its_budget_on_other_gpus(name, group_size, budget, arch):
    code, n_weights = compile_matmul(name, group_size, arch)
    check(code, arch)
    assert n_products(code) > 0
    assert code.loop.total() / n_weights <= budget


@pytest.mark.parametrize(
    ("name", "group_size", "options"),
    [
        ("int4", 128, {"dtype": "fp16"}),
        ("int4", 128, {"tail": True}),
        ("int4", 32, {}),
        ("int4", 128, {"n_tokens": 16}),
        ("int4", 128, {"n_tokens": 64}),
        ("ternary", 0, {"n_tokens": 64}),
    ],
)
def test_variants_do_not_spill(name, group_size, options):
    code, _ = compile_matmul(name, group_size, 90, **options)
    check(code, 90)
    assert n_products(code) > 0


@pytest.mark.parametrize(
    ("arch", "name", "group_size", "n_tokens", "tail"),
    [
        (80, "int4", 16, 8, False),
        (100, "binary2", 64, 64, True),
        (120, "ternary", 0, 16, False),
        (120, "ternary", 0, 32, True),
        (120, "binary2", 64, 16, True),
    ],
)
def test_what_other_tiles_would_spill_does_not(arch, name, group_size, n_tokens, tail):
    code, _ = compile_matmul(name, group_size, arch, n_tokens=n_tokens, tail=tail)
    check(code, arch)


def test_warps_of_many_tokens_do_not_unpack_the_same_weights():
    code, n_weights = compile_matmul("int4", 64, 80, n_tokens=64)
    check(code, 80)
    assert code.loop.total() / n_weights <= 7.5


@pytest.mark.parametrize(("in_features", "n_bytes"), [(4104, {16}), (3420, {16, 8})])
def test_rows_that_are_no_multiple_of_sixteen_are_copied_ahead_too(in_features, n_bytes):
    code, _ = compile_matmul("int4", 128, 90, n_tokens=64, in_features=in_features)
    check(code, 90)
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x(\w+),", code.ptx)
    assert {int(size, 16) for size in sizes} == n_bytes
    assert len(sizes) > 30  # of the weight alone there are six


@pytest.mark.parametrize("n_tokens", [32, 64])
def test_tiles_of_many_tokens_fit_a_gpu_of_little_shared_memory(n_tokens):
    code, _ = compile_matmul("int4", 0, 89, n_tokens=n_tokens)
    check(code, 89)


@pytest.mark.parametrize(("name", "group_size", "n_tokens"), [("int8", 16, 64), ("binary2", 32, 64)])
def test_products_of_small_groups_are_not_a_trap_on_sm_100(name, group_size, n_tokens):
    code, _ = compile_matmul(name, group_size, 100, n_tokens=n_tokens)
    check(code, 100)
    assert "mma.sync" in code.ptx


@pytest.mark.parametrize(
    ("arch", "name", "group_size", "n_tokens"),
    [
        (80, "int4", 0, 8),
        (90, "int4", 128, 1),
        (90, "ternary", 0, 8),
        (100, "ternary", 0, 16),
        (120, "int4", 32, 16),
    ],
)
def test_layers_in_one_launch_keep_to_the_budget_of_one(arch, name, group_size, n_tokens):
    one, n_weights_of_one = compile_matmul(name, group_size, arch, n_tokens=n_tokens, bias="*bf16")
    several, n_weights = compile_matmul(name, group_size, arch, n_tokens=n_tokens, bias="*bf16", layers=3)
    check(several, arch)
    assert several.loop["STS"] == one.loop["STS"]
    # What is chosen is chosen before the loop; tiles of half the outputs take a tenth more in it.
    assert several.loop.total() / n_weights <= 1.15 * one.loop.total() / n_weights_of_one


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "bias"), [(1, None), (3, None), (3, "*bf16")])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "ternary", "binary", "ternary2", "binary2"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 0])
@pytest.mark.parametrize("n_tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("tail", [False, True])
def test_every_default_does_not_spill(arch, name, group_size, n_tokens, tail, layers, bias):
    options = {"n_tokens": n_tokens, "tail": tail, "layers": layers, "bias": bias}
    code, _ = compile_matmul(name, group_size, arch, **options)
    check(code, arch)
    assert any(product in code.ptx for product in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


@pytest.mark.parametrize("group_size", [16, 0])
def test_sizes_of_one_compile(group_size):
    """Triton makes a constant of an argument that is 1, so such a layer is another kernel."""
    ones = {"N": 1, "K": 1, "row_units": 1, "high_units": 1, "UNIT": 1, "GROUP": group_size, "ASM": True}
    pointers = {"p_x": "*fp16", "p_weight": "*u16", "p_scales": "*fp16", "p_zeros": "*u8", "p_bias": "*fp16"}
    tiles = {"BLOCK_N": 32, "BLOCK_M": 8, "BLOCKS": 1, "K_UNIT": 1, "COMPUTE": DTYPES["fp16"]}
    constants = ones | tiles | {"FORMAT": kernel_format("int3")}
    check(compile_kernel(matmul_kernel, 90, pointers | {"p_y": "*fp16"}, constants, layers=1), 90)
    del pointers["p_x"], pointers["p_bias"]
    constants = {name: one for name, one in ones.items() if name != "ASM"} | {"BLOCK_N": 16}
    constants |= {"FORMAT": kernel_format("int3"), "K_UNIT": 1}
    check(compile_kernel(dequantize_kernel, 90, pointers | {"p_out": "*fp16"}, constants), 90)
    reduction = {"p_partial": "*fp32", "p_y": "*fp16"}
    check(compile_kernel(reduce_kernel, 90, reduction, {"n": 1, "BLOCK": 512}), 90)


def compile_dequantize(name, group_size, in_features) -> tuple[MachineCode, int]:
    """Machine code, and weights of a thread."""
    rows = dequantize_rows(in_features, group_size, get_format(name).bits)
    pointers = {"p_weight": "*u16", "p_scales": "*fp16", "p_out": "*bf16"}
    pointers["p_zeros"] = "*u8" if get_format(name).has_zero else None
    constants = {"UNIT": 16, "FORMAT": kernel_format(name), "GROUP": group_size}
    constants |= {"BLOCK_N": rows, "K_UNIT": row_unit(in_features)}
    unaligned = ("K",) if in_features % 16 else ()
    return compile_kernel(dequantize_kernel, 90, pointers, constants, unaligned=unaligned), rows


# Writing a weight takes an H200 as long as issuing about thirteen instructions for it.
@pytest.mark.parametrize(
    ("name", "group_size", "budget"),
    [
        ("int4", 128, 11.5),
        ("int4", 32, 15.0),
        ("ternary", 0, 10.0),
        ("int3", 128, 17.5),
        ("ternary2", 64, 19.0),
    ],
)
def test_dequantize_keeps_to_its_budget(name, group_size, budget):
    code, n_weights = compile_dequantize(name, group_size, 4096)
    check(code, 90)
    assert code.all.total() / n_weights <= budget
    assert code.shared_bytes == 0
    assert 8 * code.all["STG"] == n_weights


@pytest.mark.parametrize(("in_features", "per_store"), [(4104, 8), (3420, 4), (4095, 1)])
def test_dequantize_stores_as_wide_as_a_row_is_aligned(in_features, per_store):
    code, n_weights = compile_dequantize("int4", 128, in_features)
    check(code, 90)
    assert code.all["STG"] == n_weights // per_store


def test_reduction_does_not_spill():
    pointers = {"p_partial": "*fp32", "p_y": "*bf16"}
    code = compile_kernel(reduce_kernel, 90, pointers, {"BLOCK": 512})
    check(code, 90)
    assert code.all["ATOM"] + code.all["RED"] == 0
