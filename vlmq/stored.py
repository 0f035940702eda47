"""Packed codes as a checkpoint stores them, where they lie otherwise in memory.

From format version 3 on the codes of ternary formats are stored five trits a byte (`vlmq.kernels.trits`), 1.6 bits in
place of 2 (3.2 in place of 4 with two planes). `qweight` keeps its name and its rows, only its width tells:

    ternary formats, rows of more than 4 bytes    (out_features, ceil(4 row_bytes / 5))
    all others                                    (out_features, row_bytes), as in memory

Tensors are unpacked one by one while they are read: by `UnpackTrits`, which transformers calls as a conversion, so that
what is offloaded to a disk is unpacked as well; and by `unpack_layers` for those that a family's own conversion has
taken, as transformers applies only one to a tensor. So a load holds both forms of one layer at a time; a save holds the
stored form of all ternary layers beside the model.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from vlmq.formats import Format
from vlmq.integrity import offloaded_value
from vlmq.kernels import trits
from vlmq.kernels.packing import row_bytes
from vlmq.linear import QuantLinear, true_bits

LEAF = "qweight"


def stored_row_bytes(format: Format, in_features: int) -> int:
    """Number of bytes of a row of codes in a checkpoint."""
    width = row_bytes(in_features, format.bits)
    is_ternary = format.bits in trits.BITS and format.n_levels == 3 ** (format.bits // 2)
    return trits.stored_bytes(width) if is_ternary else width


def disk_bits(layer: QuantLinear) -> int:
    """Number of bits that the weight takes in a checkpoint; `vlmq.linear.true_bits` is what it takes in memory."""
    saved = layer.qweight.shape[1] - stored_row_bytes(layer.format, layer.in_features)
    return true_bits(layer) - 8 * layer.out_features * saved


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The codes that are not stored as they lie in memory, by name; offloaded ones are read."""
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and _stored_shape(layer) != tuple(layer.qweight.shape):
            codes = offloaded_value(model, f"{name}.{LEAF}", layer.qweight.detach())
            tensors[f"{name}.{LEAF}"] = trits.to_trits(codes, layer.format.bits).cpu()
    return tensors


def unpack_layers(model: nn.Module) -> None:
    """Unpack the codes that are still as the checkpoint stores them."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and not layer.qweight.is_meta:
            codes = layer.qweight.detach()
            unpacked = _unpacked(codes, layer)
            if unpacked is not codes:
                layer.qweight = nn.Parameter(unpacked, requires_grad=False)


class UnpackTrits(ConversionOps):
    """Unpacks the codes of one layer as they are read; whatever is not of the stored shape is left to the checks."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return {name of the parameter: its codes}."""
        name: str = kwargs["full_layer_name"]
        (found,) = input_dict.values()
        layer = kwargs["model"].get_submodule(name.rpartition(".")[0])
        tensor = found[0] if isinstance(found, list) else found
        return {name: _unpacked(tensor, layer) if isinstance(layer, QuantLinear) else tensor}


def conversion() -> WeightConverter:
    """For transformers to apply while it loads."""
    return WeightConverter([rf"\.{LEAF}$"], [f".{LEAF}"], [UnpackTrits()])


def forget_conversion(model: Any) -> None:
    """Keep transformers from undoing the conversion when it saves: `stored_tensors` gives what is saved."""
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if not any(isinstance(op, UnpackTrits) for op in getattr(conversion, "operations", ()))
    ]


def _stored_shape(layer: QuantLinear) -> tuple[int, int]:
    return layer.out_features, stored_row_bytes(layer.format, layer.in_features)


def _unpacked(tensor: Tensor, layer: QuantLinear) -> Tensor:
    """The codes as they lie in memory, the tensor itself if it is not of the stored shape and dtype."""
    width = row_bytes(layer.in_features, layer.format.bits)
    shape = _stored_shape(layer)
    if shape[1] == width or tuple(tensor.shape) != shape or tensor.dtype != layer.qweight.dtype:
        return tensor
    return trits.from_trits(tensor, layer.format.bits, width)
