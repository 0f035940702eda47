"""One linear layer as other packages run it: bitsandbytes, GPTQModel, torchao, GemLite, each through its own API.

    W  --the package's own rounding-->  W'   copies of W', to be read in turn, as functions of x

GPTQModel has no rounding of its own for one layer: codes are rounded here, symmetric, in groups of 128, packed by its
`TorchLinear` and loaded into the layer that it selects. Importing these packages has effects (settings of torch, lines
on stdout, patches of transformers), so the benchmarks call this in processes of their own.

What counts as bytes of a layer is what it holds once it has run: codes, scales, zero points, tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

GROUP_SIZE = 128
BITSANDBYTES_BLOCK = 64
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, AssertionError)
"""What packages raise where a layer cannot be made or run."""


@dataclass(frozen=True)
class Row:
    """One kernel of one package: its scheme, and the backend asked of GPTQModel, "auto" for its own choice."""

    peer: str
    scheme: str
    backend: str = "auto"

    @property
    def bits(self) -> int:
        """Of a code: the first digit of the scheme."""
        return int(next(letter for letter in self.scheme if letter.isdigit()))


@dataclass(frozen=True)
class PeerLayer:
    """A layer that is ready.

    Attributes:
        calls: the same layer over and over, each copy with memory of its own.
        values: (out_features, in_features) float32, the weights that it holds.
        n_bytes: of one copy.
        path: what computes it.
    """

    calls: list[Callable[[Tensor], Tensor]]
    values: Tensor
    n_bytes: int
    path: str


@dataclass(frozen=True)
class Peer:
    """A package: the module to look for, what to install, and how its layers are made."""

    module: str
    install: str
    build: Callable[[Row, Tensor, int], PeerLayer]


def why_not(peer: str) -> str | None:
    """Why a package cannot be measured here; None if it is installed."""
    known = PEERS[peer]
    return None if find_spec(known.module) else f"not installed: pip install {known.install}"


def version_of(peer: str) -> str:
    """Version of an installed package."""
    return version(PEERS[peer].install.split()[-1])


def build(row: Row, weight: Tensor, n_copies: int) -> PeerLayer:
    """Make the layer of a row from a weight, on the weight's device.

    Args:
        weight: (out_features, in_features) bfloat16.
    """
    return PEERS[row.peer].build(row, weight, n_copies)


def error_of(layer: PeerLayer, x: Tensor) -> float:
    """Relative error of the output against float64, with the weights that the layer holds."""
    return relative_error(layer.calls[0](x), layer.values, x)


def relative_error(y: Tensor, values: Tensor, x: Tensor) -> float:
    """|y - W x| / |W x|, W x in float64.

    Args:
        y: (n_tokens, out_features).
        values: (out_features, in_features), W.
        x: (n_tokens, in_features).
    """
    expected = x.double() @ values.double().T
    return float((y.double() - expected).norm() / expected.norm())


def round_symmetric(weight: Tensor, bits: int, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 2^bits - 1 around 2^(bits - 1) and scales that bfloat16 and float16 both hold exactly.

    Returns:
        codes: (out_features, in_features) uint8; scales: (out_features, n_groups) float32.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    middle = 2 ** (bits - 1)
    scales = (groups.abs().amax(2) / max(middle - 1, 1)).clamp(min=2.0**-14).bfloat16().float()
    codes = (groups / scales[..., None]).round().clamp(-middle, middle - 1) + middle
    return codes.flatten(1).to(torch.uint8), scales


def _bitsandbytes(row: Row, weight: Tensor, n_copies: int) -> PeerLayer:
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    out_features, in_features = weight.shape
    kind = row.scheme.partition("-")[0]

    def make() -> nn.Module:
        if kind == "int8":
            layer = bitsandbytes.nn.Linear8bitLt(
                in_features, out_features, bias=False, has_fp16_weights=False
            )
        else:
            layer = bitsandbytes.nn.Linear4bit(
                in_features,
                out_features,
                bias=False,
                compute_dtype=weight.dtype,
                compress_statistics=False,
                quant_type=kind,
            )
        layer.load_state_dict({"weight": weight})
        return layer.to(weight.device).eval()  # which rounds

    layers = [make() for _ in range(n_copies)]
    first = layers[0]
    x = torch.zeros(1, in_features, dtype=weight.dtype, device=weight.device)
    if kind == "int8":
        first(x)  # which hands the codes over to the state
        codes, scales = first.state.CB, first.state.SCB  # pyright: ignore[reportAttributeAccessIssue]
        return PeerLayer(
            list(layers), codes.float() * scales[:, None] / 127, codes.nbytes + scales.nbytes, "Linear8bitLt"
        )
    stored = first.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
    values = bitsandbytes.functional.dequantize_4bit(first.weight.data, stored).float()
    first(x)  # where there is a kernel for this CPU it packs the weight anew
    state = first.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
    packed = getattr(state, "packing_format_for_cpu", False)
    n_bytes = first.weight.nbytes + state.absmax.nbytes + state.code.nbytes  # pyright: ignore
    return PeerLayer(
        list(layers), values, n_bytes, "Linear4bit, packed for the CPU" if packed else "Linear4bit"
    )


def _gptqmodel(row: Row, weight: Tensor, n_copies: int) -> PeerLayer:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # pyright: ignore[reportMissingImports]
    from gptqmodel.utils.importer import hf_select_quant_linear_v2  # pyright: ignore[reportMissingImports]

    bits, device = row.bits, weight.device
    out_features, in_features = weight.shape
    layout = {
        "bits": bits,
        "group_size": GROUP_SIZE,
        "desc_act": False,
        "sym": True,
    }
    sizes = {"in_features": in_features, "out_features": out_features, "bias": False}
    codes, scales = round_symmetric(weight.cpu(), bits)
    values = (codes.float() - 2 ** (bits - 1)) * scales.repeat_interleave(GROUP_SIZE, 1)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = values
    packer = TorchLinear(**layout, **sizes)
    group_of = (torch.arange(in_features) // GROUP_SIZE).int()
    packer.pack(linear, scales, torch.full_like(scales, 2 ** (bits - 1)), group_of)
    names = ("qweight", "qzeros", "scales", "g_idx")
    kind = hf_select_quant_linear_v2(
        **layout,
        format="gptq",
        quant_method="gptq",
        dtype=weight.dtype,
        pack=False,
        device_map=str(device),
        backend=row.backend,
    )

    def make() -> nn.Module:
        layer = kind(**layout, **sizes, register_buffers=True, dtype=weight.dtype)
        for name in names:
            part = getattr(packer, name).clone()
            getattr(layer, name).data = part.to(weight.dtype) if name == "scales" else part
        layer.qzero_format(format=2)  # zero points as they are, which is how they are packed
        layer = layer.to(device).eval()
        layer.post_init()
        return layer

    layers = [make() for _ in range(n_copies)]
    layers[0](
        torch.zeros(1, in_features, dtype=weight.dtype, device=device)
    )  # some pack anew in the first call
    n_bytes = sum(getattr(layers[0], name).nbytes for name in names[:3])
    return PeerLayer(list(layers), values, n_bytes, kind.__name__)


def _torchao(row: Row, weight: Tensor, n_copies: int) -> PeerLayer:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    if row.scheme.startswith("int4"):
        from torchao.prototype.quantization.int4 import (  # pyright: ignore[reportMissingImports]
            PrototypeInt4WeightOnlyConfig,
        )

        config = PrototypeInt4WeightOnlyConfig(GROUP_SIZE, set_inductor_config=False)
    else:
        config = Int8WeightOnlyConfig(set_inductor_config=False)

    def make() -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        holder = nn.Sequential(linear)
        quantize_(holder, config)
        return linear

    layers = [make() for _ in range(n_copies)]
    stored = layers[0].weight
    parts = [getattr(stored, name) for name in stored.tensor_data_names]  # pyright: ignore
    if row.scheme.startswith("int4"):
        # There is no way to unpack it but to multiply by the unit matrix.
        values = layers[0](torch.eye(weight.shape[1], dtype=weight.dtype)).T.float()
    else:
        values = stored.dequantize().float()  # pyright: ignore
    return PeerLayer(list(layers), values, sum(part.nbytes for part in parts), type(stored).__name__)


def _gemlite(row: Row, weight: Tensor, n_copies: int) -> PeerLayer:
    from gemlite.core import DType, GemLiteLinearTriton  # pyright: ignore[reportMissingImports]

    bits = row.bits
    codes, scales = round_symmetric(weight, bits)
    out_features, in_features = weight.shape
    middle = 2 ** (bits - 1)

    def make() -> nn.Module:
        layer = GemLiteLinearTriton(
            bits, GROUP_SIZE, in_features, out_features, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        zeros = torch.full_like(scales, middle, dtype=weight.dtype)
        layer.pack(codes, scales.to(weight.dtype), zeros, None)
        return layer

    layers = [make() for _ in range(n_copies)]
    n_bytes = sum(getattr(layers[0], name).nbytes for name in ("W_q", "scales", "zeros"))
    values = (codes.float() - middle) * scales.repeat_interleave(GROUP_SIZE, 1)
    return PeerLayer(list(layers), values, n_bytes, "GemLiteLinearTriton")


PEERS: dict[str, Peer] = {
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes", _bitsandbytes),
    "GPTQModel": Peer("gptqmodel", "gptqmodel", _gptqmodel),
    "torchao": Peer("torchao", "torchao", _torchao),
    "GemLite": Peer("gemlite", "gemlite", _gemlite),
}

CPU_ROWS = (
    Row("bitsandbytes", f"nf4-g{BITSANDBYTES_BLOCK}"),
    Row("bitsandbytes", f"fp4-g{BITSANDBYTES_BLOCK}"),
    Row("bitsandbytes", "int8-channel"),
    Row("GPTQModel", "int4-g128"),
    Row("GPTQModel", "int4-g128", "gptq_torch_aten"),
    Row("GPTQModel", "int3-g128"),
    Row("GPTQModel", "int2-g128"),
    Row("torchao", "int4-g128"),
    Row("torchao", "int8-channel"),
)
GPU_ROWS = (
    Row("bitsandbytes", f"nf4-g{BITSANDBYTES_BLOCK}"),
    Row("GPTQModel", "int4-g128"),
    Row("GPTQModel", "int4-g128", "gptq_marlin"),
    Row("GPTQModel", "int2-g128"),
    Row("GemLite", "int4-g128"),
    Row("GemLite", "int2-g128"),
)
