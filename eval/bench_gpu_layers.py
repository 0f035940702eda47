"""The layers that `vlmq.eval.bench_gpu` measures, and the calls that it times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlmq.formats import get_format
from vlmq.kernels.packing import row_bytes

LAYERS = ((4096, 4096), (4096, 14336), (8192, 28672))
"""(in_features, out_features)."""

DECODE_TOKENS = (1, 16)
PREFILL_TOKENS = (2048, 4096)
FORMATS = (("int4", 128), ("int2", 128), ("ternary", 0), ("binary", 0))
JOINT_INPUTS, JOINT_WIDTHS = 3584, (3584, 512, 512)
"""Queries, keys and values of Qwen2.5-VL-7B."""

JOINT_FORMATS = (("int4", 128), ("ternary", 0))
JOINT_KERNELS = ("vlmq-joint", "vlmq-apart")
"""Layers of one input in one launch, and in one launch each."""

INT8_FORMATS = (("int2", 128), ("ternary", 0), ("binary", 0))
LARGEST_ERROR = {"vlmq": 1e-2, "vlmq-a8": 5e-2, "vlmq-joint": 1e-2, "vlmq-apart": 1e-2}
"""Relative to the reference with 16-bit activations; 8-bit ones are rounded to a 127th of the largest."""


@dataclass(frozen=True)
class Case:
    """One measurement: `kernel` is torch-bf16, torch-int4, vlmq or vlmq-a8, or one of JOINT_KERNELS."""

    kernel: str
    format_name: str
    group_size: int
    in_features: int
    out_features: int
    n_tokens: int

    @property
    def bytes_read(self) -> int:
        """Bytes of the weight with scales and zero points, of x and of y."""
        n, k = self.out_features, self.in_features
        io = 2 * self.n_tokens * (n + k)
        if self.kernel == "torch-bf16":
            return 2 * n * k + io
        fmt = get_format(self.format_name)
        n_groups = n * (-(-k // self.group_size) if self.group_size else 1)
        return n * row_bytes(k, fmt.bits) + n_groups * (2 * fmt.n_terms + fmt.has_zero) + io

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.n_tokens * self.in_features * self.out_features


def plan() -> list[Case]:
    """Return all measurements in this process: the most wanted first, should the time not do."""
    cases = []
    for in_features, out_features in reversed(LAYERS):
        for n_tokens in (*DECODE_TOKENS, *PREFILL_TOKENS):
            size = (in_features, out_features, n_tokens)
            cases.append(Case("torch-bf16", "", 0, *size))
            cases += [Case("vlmq", name, group, *size) for name, group in FORMATS]
            if n_tokens in DECODE_TOKENS:
                cases.append(Case("torch-int4", "int4", 128, *size))
            if n_tokens == 1:
                cases += [Case("vlmq-a8", name, group, *size) for name, group in INT8_FORMATS]
    size = (JOINT_INPUTS, sum(JOINT_WIDTHS), 1)
    cases.append(Case("torch-bf16", "", 0, *size))
    for name, group in JOINT_FORMATS:
        cases += [Case(kernel, name, group, *size) for kernel in JOINT_KERNELS]
    return cases


def calls_of(case: Case) -> list[Callable[[], torch.Tensor]]:
    """Return one call per copy of the weight, checked against the reference where the kernel is vlmq's."""
    x = torch.randn(case.n_tokens, case.in_features, device="cuda", dtype=torch.bfloat16)
    if case.kernel == "torch-bf16":
        return _dense_calls(case, x)
    if case.kernel == "torch-int4":
        return _torch_int4_calls(case, x)
    return _joint_calls(case, x) if case.kernel in JOINT_KERNELS else _vlmq_calls(case, x)


def _n_copies(n_bytes: int) -> int:
    from vlmq.kernels.triton_tune import COLD_BYTES

    return max(3, COLD_BYTES // n_bytes)


def _dense_calls(case: Case, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    shape = (case.out_features, case.in_features)
    n_copies = _n_copies(2 * shape[0] * shape[1])
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(n_copies)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def _torch_int4_calls(case: Case, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    n, k, group = case.out_features, case.in_features, case.group_size
    codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    n_copies = _n_copies(n * k // 2)
    packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(n_copies)]
    scales = torch.rand(k // group, n, 2, device="cuda", dtype=torch.bfloat16)
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, group, scales) for w in packed]


def _vlmq_calls(case: Case, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    from vlmq.kernels import triton_int8, triton_linear

    sizes = (case.format_name, case.in_features, case.group_size)
    run = triton_int8.quant_linear if case.kernel == "vlmq-a8" else triton_linear.quant_linear
    weights = _weights(case, case.out_features)
    _check(case, run(x, *weights[0], None, *sizes), x, [weights[0]])
    return [lambda w=w: run(x, *w, None, *sizes) for w in weights]


def _joint_calls(case: Case, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    from vlmq.kernels import triton_linear

    sizes = (case.format_name, case.in_features, case.group_size)
    n_copies = len(_weights(case, case.out_features))
    of_width = [_weights(case, width)[:n_copies] for width in JOINT_WIDTHS]
    weights = [[(*weight, None) for weight in layers] for layers in zip(*of_width, strict=True)]

    def apart(layers: list[tuple]) -> torch.Tensor:
        return [triton_linear.quant_linears(x, [layer], *sizes) for layer in layers][-1]

    def together(layers: list[tuple]) -> torch.Tensor:
        return triton_linear.quant_linears(x, layers, *sizes)

    _check(case, together(weights[0]).view(1, -1), x, [layer[:3] for layer in weights[0]])
    run = together if case.kernel == "vlmq-joint" else apart
    return [lambda layers=layers: run(layers) for layers in weights]


def _weights(case: Case, out_features: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    from vlmq.kernels.triton_tune import Shape, cold_weights

    return cold_weights(
        Shape(case.format_name, case.group_size, out_features, case.in_features, case.n_tokens)
    )


def _check(
    case: Case,
    y: torch.Tensor,
    x: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> None:
    """Compare y (n_tokens, out_features) with the reference.

    Raises:
        RuntimeError: they differ by more than LARGEST_ERROR.
    """
    from vlmq.kernels import reference

    sizes = (case.format_name, case.in_features, case.group_size)
    # Of many tokens those before the last sixteen would need a large product of the reference.
    parts = [reference.quant_linear(x[-16:], *layer, None, *sizes).double() for layer in layers]
    expected = torch.cat(parts, -1)
    error = float((y[-16:].double() - expected).norm() / expected.norm())
    if not error < LARGEST_ERROR[case.kernel]:
        raise RuntimeError(f"{case} differs from the reference by {error:.2e}")
