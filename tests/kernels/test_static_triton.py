"""What the kernels compile to, without a GPU: no spills, tensor cores, few instructions per weight.

Instructions are counted in one iteration of the main loop, per lane and weight of the thread block. Counts, not
times. The budgets of int4 and 2 bits are those at which issuing instructions takes about as long as reading the weights
on an H200; the others hold what is reached.
"""

import pytest
from triton_static import DTYPES, SHARED_LIMIT, MachineCode, compile_kernel, kernel_format, skip_without_tools

from vlmq.formats import get_format
from vlmq.kernels.triton_dequant import dequantize_kernel
from vlmq.kernels.triton_matmul import matmul_kernel, reduce_kernel

pytestmark = pytest.mark.usefixtures("_tools")

TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}

# (format, group size, blocks per iteration, most instructions per weight on sm_90)
DECODE = [
    ("int4", 128, 1, 2.6),
    ("int4-sym", 0, 2, 2.6),
    ("int2", 128, 1, 2.9),
    ("ternary", 128, 1, 2.9),
    ("ternary", 0, 2, 2.9),
    ("binary", 0, 2, 2.9),
    ("int8", 128, 1, 2.9),
    ("int3", 128, 1, 4.8),
    ("binary", 128, 1, 3.6),
    ("ternary2", 128, 1, 6.0),
    ("binary2", 128, 1, 4.6),
]


@pytest.fixture(scope="module")
def _tools():
    skip_without_tools()


def compile_matmul(
    name, group_size, arch, *, blocks=1, dtype="bf16", block_m=16, tail=False, block_n=128, stages=4
) -> tuple[MachineCode, float]:
    """Machine code, and instructions of its main loop per weight."""
    zeros = "*u8" if get_format(name).has_zero else None
    code = compile_kernel(
        matmul_kernel,
        arch,
        {
            "p_x": f"*{dtype}",
            "p_weight": "*u16",
            "p_scales": "*fp16",
            "p_zeros": zeros,
            "p_bias": None,
            "p_y": "*fp32",
        },
        {
            "UNIT": 16,
            "FORMAT": kernel_format(name),
            "GROUP": group_size,
            "BLOCK_N": block_n,
            "BLOCK_M": block_m,
            "BLOCKS": blocks,
            "TAIL": tail,
            "COMPUTE": DTYPES[dtype],
            "ASM": True,
        },
        stages=stages if arch >= 90 else 3,
    )
    return code, code.loop.total() / (block_n * 128 * blocks / (4 * 32))


def check(code: MachineCode, arch: int) -> None:
    assert code.n_spills == 0
    assert code.shared_bytes <= SHARED_LIMIT[arch]


@pytest.mark.parametrize(("name", "group_size", "blocks", "budget"), DECODE)
def test_decode_keeps_to_its_budget(name, group_size, blocks, budget):
    code, per_weight = compile_matmul(name, group_size, 90, blocks=blocks)
    check(code, 90)
    assert code.loop["HGMMA"] > 0
    assert per_weight <= budget


@pytest.mark.parametrize("name", ["int4", "ternary"])
def test_decode_weights_reach_tensor_cores_in_registers(name):
    code, _ = compile_matmul(name, 0, 90, blocks=2)
    assert code.loop["STS"] == 0


@pytest.mark.parametrize(("name", "group_size", "blocks"), [("int4", 128, 1), ("ternary", 0, 2)])
def test_decode_compiles_for_ampere(name, group_size, blocks):
    code, per_weight = compile_matmul(name, group_size, 80, blocks=blocks)
    check(code, 80)
    assert code.loop["HMMA"] > 0
    assert per_weight <= 2.6


@pytest.mark.parametrize(
    ("name", "group_size", "options"),
    [
        ("int4", 128, {"dtype": "fp16"}),
        ("int4", 128, {"tail": True}),
        ("int4", 32, {}),
        ("int4", 128, {"block_m": 64, "stages": 3}),
        ("ternary", 0, {"block_m": 64, "blocks": 2, "stages": 3}),
    ],
)
def test_variants_do_not_spill(name, group_size, options):
    code, _ = compile_matmul(name, group_size, 90, **options)
    check(code, 90)
    assert code.loop["HGMMA"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "ternary", "binary", "ternary2", "binary2"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 0])
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("tail", [False, True])
def test_every_default_does_not_spill(arch, name, group_size, block_m, tail):
    blocks = 1 if group_size or name == "int8" else 2
    code, _ = compile_matmul(
        name, group_size, arch, blocks=blocks, block_m=block_m, tail=tail, stages=4 if block_m < 64 else 3
    )
    check(code, arch)
    assert code.loop[TENSOR_CORE[arch]] > 0


@pytest.mark.parametrize("name", ["int4", "ternary2"])
def test_dequantize_does_not_spill(name):
    pointers = {"p_weight": "*u16", "p_scales": "*fp16", "p_out": "*bf16"}
    pointers["p_zeros"] = "*u8" if get_format(name).has_zero else None
    constants = {"UNIT": 16, "FORMAT": kernel_format(name), "GROUP": 128, "BLOCK_N": 16}
    check(compile_kernel(dequantize_kernel, 90, pointers, constants), 90)


def test_reduction_does_not_spill():
    pointers = {"p_partial": "*fp32", "p_bias": "*bf16", "p_y": "*bf16"}
    code = compile_kernel(reduce_kernel, 90, pointers, {"BLOCK": 512})
    check(code, 90)
    assert code.all["ATOM"] + code.all["RED"] == 0
