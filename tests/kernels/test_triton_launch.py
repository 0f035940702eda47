"""What is settled before a Triton kernel starts: sizes of the parts, grids, and which kernel; nothing is launched."""

import pytest
import torch
from random_weights import random_weight

pytest.importorskip("triton", reason="triton is not installed")

from vlmq.formats import get_format  # noqa: E402
from vlmq.kernels import triton_backend, triton_int8, triton_linear  # noqa: E402
from vlmq.kernels.packing import pack, row_bytes  # noqa: E402

LARGEST_GRID = (2**31 - 1, 65535, 65535)


class Launches:
    """Stands for a kernel, keeps the grids."""

    def __init__(self):
        self.grids = []
        self.arguments = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **_: self.arguments.append(args)


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    for module, name in (
        (triton_linear, "matmul_kernel"),
        (triton_linear, "reduce_kernel"),
        (triton_linear, "dequantize_kernel"),
        (triton_int8, "quantize_kernel"),
        (triton_int8, "int8_matmul_kernel"),
    ):
        monkeypatch.setattr(module, name, found)
    return found


def parts(name="int4", group_size=64):
    weight = random_weight(name, 9, 256, group_size)
    return {
        "qweight": pack(weight.codes, weight.format.bits),
        "scales": weight.scales,
        "zeros": weight.zeros,
        "bias": torch.zeros(9, dtype=torch.half),
    }


HOSTILE = {
    "qweight": [lambda t: t[:, :-2], lambda t: t.view(torch.int8), lambda t: t[0], lambda t: t.to("meta")],
    "scales": [lambda t: t[:, :-1], lambda t: t[:1], lambda t: t.float(), lambda t: t[..., 0]],
    "zeros": [lambda t: t[:, :1], lambda t: None, lambda t: t.int()],
    "bias": [lambda t: t[:8], lambda t: t[:, None]],
}


@pytest.mark.parametrize(("part", "change"), [(p, change) for p in HOSTILE for change in HOSTILE[p]])
def test_parts_of_other_sizes_are_refused_before_a_launch(launches, part, change):
    changed = parts() | {part: change(parts()[part])}
    x = torch.zeros(1, 256, dtype=torch.half)
    with pytest.raises(ValueError, match=f"^{part} of a int4 layer with 256 inputs|^scales of a int4"):
        triton_linear.quant_linear(x, *changed.values(), "int4", 256, 64)
    if part != "bias":
        weight = (changed["qweight"], changed["scales"], changed["zeros"])
        with pytest.raises(ValueError, match="of a int4 layer with 256 inputs"):
            triton_linear.quant_linear_grad(torch.zeros(1, 9), *weight, "int4", 256, 64)
    assert launches.grids == []


def test_parts_of_other_sizes_are_refused_with_8_bit_activations(launches):
    own = parts("ternary", None)
    own["scales"] = own["scales"][:4]
    with pytest.raises(ValueError, match="scales of a ternary layer"):
        triton_int8.quant_linear(torch.zeros(1, 256), *own.values(), "ternary", 256, 0)
    assert launches.grids == []


@pytest.mark.parametrize("shape", [(), (2, 128), (4, 64), (1, 512)])
def test_input_of_another_width_is_refused(launches, shape):
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 256\)"):
        triton_linear.quant_linear(torch.zeros(shape, dtype=torch.half), *parts().values(), "int4", 256, 64)
    assert launches.grids == []


def test_parts_with_gaps_are_copied(launches):
    own = parts()
    spread = torch.zeros(9, 8, 1, dtype=torch.half)[:, ::2].copy_(own["scales"])
    assert not spread.is_contiguous()
    x = torch.zeros(1, 256, dtype=torch.half)
    triton_linear.quant_linear(x, *(own | {"scales": spread}).values(), "int4", 256, 64)
    (given,) = launches.arguments[0][2]
    assert given.is_contiguous()
    assert torch.equal(given, own["scales"])


@pytest.mark.parametrize(("out_features", "in_features"), [(1_100_000, 1), (3, 2**24)])
def test_grids_fit_the_gpu(launches, out_features, in_features):
    fmt = get_format("binary-sym")
    qweight = torch.zeros(out_features, row_bytes(in_features, fmt.bits), dtype=torch.uint8)
    scales = torch.zeros(out_features, 1, fmt.n_terms, dtype=torch.half)
    triton_linear.dequantize(qweight, scales, None, fmt.name, in_features, 0, torch.half)
    for n_tokens in (1, 256) if in_features == 1 else (1,):
        x = torch.zeros(n_tokens, in_features, dtype=torch.half)
        triton_linear.fused_linear(x, qweight, scales, None, fmt.name, in_features, 0)
    assert len(launches.grids) >= 2
    for grid in launches.grids:
        assert all(0 < size <= limit for size, limit in zip(grid, LARGEST_GRID, strict=False))


@pytest.mark.parametrize(
    ("name", "group_size", "n_tokens", "expected"),
    [
        ("ternary", 0, 1, "int8"),
        ("ternary", 0, 4, "int8"),
        ("ternary", 0, 5, "plain"),
        ("ternary", 64, 1, "plain"),
        ("int3", 0, 1, "plain"),
    ],
)
def test_entry_of_8_bit_activations_takes_them_for_few_tokens(
    monkeypatch, name, group_size, n_tokens, expected
):
    monkeypatch.setattr(triton_int8, "quant_linears", lambda *_: "int8")
    monkeypatch.setattr(triton_linear, "quant_linears", lambda *_: "plain")
    x = torch.zeros(1, n_tokens, 256)
    assert triton_backend.quant_linears_a8(x, [], name, 256, group_size) == expected


@pytest.mark.parametrize("module", [triton_linear, triton_int8])
def test_layers_of_one_input_are_one_launch(launches, module):
    layers = [tuple(parts("ternary", None).values()) for _ in range(3)]
    x = torch.zeros(2, 256, dtype=torch.half)
    y = module.quant_linears(x, layers, "ternary", 256, 0)
    assert y.shape == (3 * 2 * 9,)
    # One product; with 8-bit activations it comes after their rounding and before the sum.
    assert len(launches.grids) == {triton_linear: 1, triton_int8: 3}[module]
    given = [argument for args in launches.arguments for argument in args if isinstance(argument, tuple)]
    assert given[-1] == (9, 9, 9)
    assert {len(argument) for argument in given} == {3}


@pytest.mark.parametrize("other", [torch.float32, None])
def test_biases_that_one_kernel_cannot_read_are_refused(launches, other):
    first, second = parts(), parts()
    second["bias"] = None if other is None else second["bias"].to(other)
    layers = [tuple(first.values()), tuple(second.values())]
    with pytest.raises(ValueError, match=r"must be of one dtype, or none, got \[torch.float16, "):
        triton_linear.quant_linears(torch.zeros(1, 256, dtype=torch.half), layers, "int4", 256, 64)
    assert launches.grids == []
