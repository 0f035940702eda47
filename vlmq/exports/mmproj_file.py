"""The second file of an export to GGUF: the vision part of a model, `mmproj-model.gguf`.

    packed layers           in blocks, as in the text part; where no block says one, in the smallest float that does
    other matrices          in the model's dtype
    convolutions, vectors,
    tables of positions     float32 (a convolution of a float16 model: float16), which llama.cpp asks for

Blocks hold 32 weights, and towers have widths such as 4304 and 3420 inside their blocks. Such a layer is padded: its
last codes are repeated, and the rows of the layer before it, which make those inputs, get zeros, so that the
activation gives zeros there. Nothing else changes.

Pictures are normalized as the model's image processor says; llama.cpp has ways of its own to resize and cut them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlmq.exports.gguf_blocks import Blocks
from vlmq.exports.gguf_file import add_tensors
from vlmq.exports.mmproj_families import ALONE
from vlmq.exports.mmproj_layout import Piece, VisionPart
from vlmq.formats import QuantizedWeight
from vlmq.linear import QuantLinear

FILE = "mmproj-model.gguf"
N_WEIGHTS = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BEFORE = ("ffn_up", "ffn_gate")
BREAK = "[IMG_BREAK]"


class PaddedLayer:
    """A packed layer whose width is filled up to a multiple of 32, with the codes of its last column."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer

    def quantized_weight(self) -> QuantizedWeight:
        """The layer with `-in_features % 32` more columns."""
        weight = self.layer.quantized_weight()
        n_more = -weight.codes.shape[1] % N_WEIGHTS
        if not n_more:
            return weight
        return replace(weight, codes=torch.cat([weight.codes, weight.codes[:, -1:].expand(-1, n_more)], 1))


def packed_in_vision(part: VisionPart) -> dict[str, QuantLinear | PaddedLayer]:
    """The packed layers of the vision part by their path in the model."""
    found: dict[str, QuantLinear | PaddedLayer] = {}
    for piece in part.pieces:
        if isinstance(piece.module, QuantLinear):
            is_inner = piece.name.endswith(".ffn_down")
            found[piece.path] = PaddedLayer(piece.module) if is_inner else piece.module
    return found


def collect(
    part: VisionPart, model: PreTrainedModel, blocks: Mapping[str, Blocks], processor: Any
) -> dict[str, Blocks | Tensor]:
    """All tensors by their names in the file.

    Args:
        part: the vision part.
        model: for the parameters that stand alone.
        blocks: packed layers by their path in the model; those that are missing become floats.
        processor: whose tokenizer knows the token that Pixtral shows after a row of patches.
    """
    tensors: dict[str, Blocks | Tensor] = {}
    for piece in part.pieces:
        tensors[f"{piece.name}.weight"] = _weight(piece, blocks)
        if isinstance(bias := getattr(piece.module, "bias", None), Tensor):
            tensors[f"{piece.name}.bias"] = _rows(bias.detach(), piece.rows)
    for lone in part.lone:
        tensors[lone.name] = _plain(lone.take(model.get_parameter(lone.path)))
    words = getattr(processor, "tokenizer", processor).get_vocab()
    if part.projector == "pixtral" and BREAK in words:
        rows: Any = model.get_input_embeddings()
        tensors["v.token_embd.img_break"] = rows.weight.detach()[words[BREAK]]
    for name in [name for name in tensors if name.endswith(".ffn_down.weight")]:
        _fill_up(tensors, name.removesuffix("ffn_down.weight"))
    is_float32 = ("v.position_embd.weight", "v.class_embd")
    return {
        n: t.float() if isinstance(t, Tensor) and (t.ndim == 1 or n in is_float32) else t
        for n, t in tensors.items()
    }


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _plain(tensor: Tensor) -> Tensor:
    """What stands in no block; a convolution's kernel of bfloat16 would not be read."""
    is_kernel = tensor.ndim > 2
    return tensor.float() if is_kernel and tensor.dtype == torch.bfloat16 else tensor


def _weight(piece: Piece, blocks: Mapping[str, Blocks]) -> Blocks | Tensor:
    module = piece.module
    if not isinstance(module, QuantLinear):
        return _plain(_rows(_parameter(module), piece.rows))
    if piece.path in blocks:
        packed = blocks[piece.path]
        return Blocks(packed.type, _rows(packed.data, piece.rows))
    exact = module.dequantize()
    dtype = next(d for d in FLOATS if torch.equal(exact.to(d).float(), exact))
    return _rows(exact.to(dtype), piece.rows)


def _parameter(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").detach()


def _fill_up(tensors: dict[str, Blocks | Tensor], block: str) -> None:
    """Rows of zeros for the layers before one that was padded, as many as it has columns more."""
    down = tensors[f"{block}ffn_down.weight"]
    for name in (f"{block}{before}.weight" for before in BEFORE):
        if name not in tensors:
            continue
        rows = tensors[name]
        n_more = down.shape[1] - rows.shape[0]
        if n_more <= 0:
            continue
        if isinstance(rows, Blocks):
            tensors[name] = Blocks(rows.type, pad(rows.data, (0, 0, 0, n_more)))
        else:
            tensors[name] = pad(rows, (0, 0, 0, n_more))
        bias = tensors.get(name.replace(".weight", ".bias"))
        if isinstance(bias, Tensor):
            tensors[name.replace(".weight", ".bias")] = pad(bias, (0, n_more))


def picture_fields(part: VisionPart, processor: Any) -> dict[str, Any]:
    """Fields of the header that tell what is done to a picture.

    Raises:
        ValueError: there is no image processor, or it does what llama.cpp does not.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise ValueError(
            "a GGUF file of the vision part says how pictures are normalized: expected a processor with an "
            f"image_processor, got {type(processor).__name__}; {ALONE}"
        )
    factor = getattr(images, "rescale_factor", 1 / 255) if getattr(images, "do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"llama.cpp divides pixels by 255, this image processor multiplies them by {factor}")
    is_plain = not getattr(images, "do_normalize", True)
    mean, deviation = ([0.0] * 3, [1.0] * 3) if is_plain else (images.image_mean, images.image_std)
    fields: dict[str, Any] = {
        "clip.vision.image_mean": [float(value) for value in mean],
        "clip.vision.image_std": [float(value) for value in deviation],
    }
    return fields | (PICTURES[part.projector](images) if part.projector in PICTURES else {})


def _longest_edge(images: Any) -> dict[str, Any]:
    """To which pictures are enlarged before they are cut into squares."""
    return {"clip.vision.preproc_image_size": int(images.size["longest_edge"])}


def _tiles(images: Any) -> dict[str, Any]:
    """Into how many squares a picture is cut."""
    return {
        "clip.vision.preproc_min_tiles": int(images.min_patches),
        "clip.vision.preproc_max_tiles": int(images.max_patches),
    }


PICTURES: dict[str, Callable[[Any], dict[str, Any]]] = {"idefics3": _longest_edge, "internvl": _tiles}


def write_file(
    path: Path, part: VisionPart, fields: Mapping[str, Any], tensors: Mapping[str, Blocks | Tensor]
) -> None:
    """Write the file.

    Args:
        path: of the file.
        part: for the sizes.
        fields: of `picture_fields`.
        tensors: by their names in the file.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    writer = GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(part.projector)
    for key, value in {**part.sizes, **fields}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    add_tensors(writer, tensors)


def floats_of(part: VisionPart, blocks: Mapping[str, Blocks]) -> dict[str, int]:
    """How packed layers that no block says are stored, and how many of each."""
    pieces = {p.path: p for p in part.pieces if isinstance(p.module, QuantLinear) and p.path not in blocks}
    dtypes = (str(w.dtype) for p in pieces.values() if isinstance(w := _weight(p, {}), Tensor))
    return dict(Counter(f"{dtype.removeprefix('torch.')}, as no block says them" for dtype in dtypes))
