"""Export to GGUF: the file for llama.cpp that holds the text part of a model and its tokenizer.

    layers in blocks   the first type of a list that can say the packed values exactly (`vlmq.exports.gguf_blocks`)
    other matrices     in the model's dtype; packed embeddings and heads in blocks where these can say them
    norms, biases      float32, which llama.cpp asks for

Names, sizes and the order of rows are in `vlmq.exports.gguf_layout`, the tokenizer in `vlmq.exports.gguf_vocabulary`;
the vision part is a file of its own, `vlmq.exports.mmproj_file`.
llama.cpp rounds the inputs of a layer to 8 bits, so outputs differ in the last digits though the weights do not. The
package gguf writes the file; types newer than the package are written by their number.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.embedding import QuantEmbedding
from vlmq.exports.gguf_blocks import Blocks, to_blocks
from vlmq.exports.gguf_layout import TextPart, rope_factors, text_part, write_header
from vlmq.exports.gguf_vocabulary import Vocabulary, write_vocabulary
from vlmq.linear import QuantLinear

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
NEW_TYPES = ("Q1_0", "Q2_0")


def check_package() -> None:
    """That the package which writes the file is there.

    Raises:
        ValueError: it is not.
    """
    if find_spec("gguf") is None:
        raise ValueError("the export to gguf needs the package gguf: pip install gguf")


def n_rows(part: TextPart) -> int:
    """Rows of the token embedding."""
    return part.decoder.embed_tokens.weight.shape[0]


def packed_in_text(model: PreTrainedModel) -> dict[str, QuantLinear]:
    """The packed layers of the text part by their path in the model."""
    found = ((name, module) for name, module, _ in text_part(model).modules())
    return {name: module for name, module in found if isinstance(module, QuantLinear)}


def collect(part: TextPart, blocks: Mapping[str, Blocks], types: Sequence[str]) -> dict[str, Blocks | Tensor]:
    """All matrices and vectors by their names in the file.

    Args:
        part: the text part.
        blocks: the packed layers of the text part, by their path in the model.
        types: block types for a packed embedding and head.
    """
    tensors: dict[str, Blocks | Tensor] = {"token_embd.weight": _rows(part.decoder.embed_tokens, types)}
    if not _is_tied(part):
        tensors["output.weight"] = _rows(part.head, types)
    for path, module, name in part.modules():
        if path in blocks:
            packed = blocks[path]
            tensors[f"{name}.weight"] = Blocks(packed.type, part.reorder(name, packed.data))
        else:
            tensors[f"{name}.weight"] = part.reorder(name, module.get_parameter("weight").detach())
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            tensors[f"{name}.bias"] = part.reorder(name, bias.detach())
    if (factors := rope_factors(part)) is not None:
        tensors["rope_freqs.weight"] = factors
    return {n: t.float() if isinstance(t, Tensor) and t.ndim == 1 else t for n, t in tensors.items()}


def _rows(module: nn.Module, types: Sequence[str]) -> Blocks | Tensor:
    """An embedding or head: in blocks if packed and said exactly, else in the model's dtype."""
    packed = module.rows if isinstance(module, QuantEmbedding) else module
    if isinstance(packed, QuantLinear):
        try:
            return to_blocks(packed.quantized_weight(), types)
        except ValueError:
            return packed.dequantize(module.weight.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    return module.get_parameter("weight").detach()


def _is_tied(part: TextPart) -> bool:
    """Whether the output head reads the token embedding."""
    embedding, head = part.decoder.embed_tokens, part.head
    if isinstance(embedding, QuantEmbedding):
        return embedding.rows is head
    return getattr(head, "weight", None) is embedding.weight


def write_file(path: Path, part: TextPart, tensors: Mapping[str, Blocks | Tensor], words: Vocabulary) -> None:
    """Write the file.

    Args:
        path: of the file.
        part: for the sizes.
        tensors: by their names in the file.
        words: the tokenizer.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    writer = GGUFWriter(path, part.architecture)
    if name := Path(getattr(part.config, "_name_or_path", "") or "").name:
        writer.add_name(name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_header(writer, part, len(words.tokens))
    write_vocabulary(writer, words)
    add_tensors(writer, tensors)


def add_tensors(writer: "GGUFWriter", tensors: Mapping[str, Blocks | Tensor]) -> None:
    """Write all tensors, and with them the file."""
    for name, tensor in tensors.items():
        raw = (tensor.data if isinstance(tensor, Blocks) else tensor).cpu().contiguous()
        number: Any = tensor.type.number if isinstance(tensor, Blocks) else DTYPES[tensor.dtype]
        # As int8, which the writer takes as it is: of bytes it would look the shape up by the type.
        writer.add_tensor(name, raw.view(torch.int8).numpy(), raw_shape=tensor.shape, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def n_bytes(tensors: Mapping[str, Blocks | Tensor]) -> int:
    """Size of what is written."""
    raw = (t.data if isinstance(t, Blocks) else t for t in tensors.values())
    return sum(t.numel() * t.element_size() for t in raw)


def kinds(blocks: Mapping[str, Blocks]) -> dict[str, int]:
    """How the packed layers are stored, and how many of each."""
    return dict(Counter(f"{b.type.name}, {b.type.bits_per_weight} bits" for b in blocks.values()))


def notes_on(model: PreTrainedModel, blocks: Mapping[str, Blocks], words: Vocabulary) -> list[str]:
    """What a reader must know."""
    notes = list(words.notes)
    part = text_part(model)
    if part.context_length < part.config.max_position_embeddings:
        notes.append(f"the context ends at the sliding window of {part.context_length} tokens")
    layers = dict(model.named_modules())
    wide = [
        name
        for name, written in blocks.items()
        if isinstance(layer := layers[name], QuantLinear)
        and written.type.bits_per_weight > layer.format.bits + 1.5
    ]
    if wide:
        size = layers[wide[0]].format.name  # pyright: ignore[reportAttributeAccessIssue]
        notes.append(
            f"{len(wide)} layers such as {wide[0]} ({size}) take {blocks[wide[0]].type.bits_per_weight} bits, as no "
            "narrower block has room for their scales: one scale per channel, or gguf-small, is smaller"
        )
    if used := sorted({b.type.name for b in blocks.values()} & set(NEW_TYPES)):
        notes.append(
            f"{' and '.join(used)} need a llama.cpp of 2026; gguf 0.19 and transformers 5.23 know neither"
        )
    return notes
