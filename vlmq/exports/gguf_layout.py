"""The text part of a model as llama.cpp lays it out: names, order of rows, sizes, rotary positions.

One record for each kind of decoder that llama.cpp computes as transformers does; the language part of a
vision-language model is one of them, its tower and projector are not in the file. A decoder that holds anything that
the layout has no name for is refused, so nothing is left out in silence.

llama.cpp's "llama" rotates neighbouring elements of a head where transformers rotates its halves, so the rows of q and
k are reordered there, packed or not: rows have scales of their own, and nothing changes. Its other architectures rotate
halves. Positions of text are alike on all axes of Qwen's multi-axis rotary embedding, which needs its sections only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
}
BIASED = {
    "llama": tuple(LAYERS.values()),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen2vl": ("attn_q", "attn_k", "attn_v"),
    "qwen3": (),
    "qwen3vl": (),
}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class TextPart:
    """The decoder and output head of a model.

    Attributes:
        architecture: llama.cpp's name.
        decoder: with `embed_tokens`, `layers` and `norm`.
        path: of the decoder in the model.
        head: the output head.
        config: of the decoder.
        n_deepstack: layers that take features of the image besides (Qwen3-VL).
    """

    architecture: str
    decoder: Any
    path: str
    head: nn.Module
    config: Any
    n_deepstack: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.decoder.layers[0].self_attn.head_dim

    @property
    def context_length(self) -> int:
        """Positions; where attention sees a window only, that window, within which nothing differs."""
        longest = self.config.max_position_embeddings
        window = getattr(self.config, "sliding_window", None)
        is_off = getattr(self.config, "use_sliding_window", None) is False
        return longest if window is None or is_off else min(longest, window)

    def modules(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(path in the model, module, name in the file), embedding and head apart."""
        for i, layer in enumerate(self.decoder.layers):
            for name, short in LAYERS.items():
                module = dict(layer.named_modules()).get(name)
                if module is not None:
                    yield f"{self.path}.layers.{i}.{name}", module, f"blk.{i}.{short}"
        yield f"{self.path}.norm", self.decoder.norm, "output_norm"

    def reorder(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a module as the file has them; `name` is that in the file."""
        if self.architecture != "llama" or _short(name) not in ("attn_q", "attn_k"):
            return rows
        return rows[interleaved_halves(len(rows), self.head_dim)]


def interleaved_halves(n_rows: int, head_dim: int) -> Tensor:
    """Places from which rows are taken, so that the first and second half of each head alternate."""
    return torch.arange(n_rows).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def text_part(model: PreTrainedModel) -> TextPart:
    """Find the text part, and check that the layout can say it.

    Raises:
        ValueError: it cannot; the message says why.
    """
    decoder: Any = model.get_decoder()
    config = getattr(decoder, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES or not hasattr(decoder, "layers"):
        raise ValueError(
            f"gguf is written for the text part of {', '.join(ARCHITECTURES)}; this model's is {kind!r}"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"gguf needs an output head, {type(model).__name__} has none")
    if getattr(config, "hidden_act", None) != "silu":
        raise ValueError(f"llama.cpp computes {kind} with silu, this one has {config.hidden_act!r}")
    vision = getattr(model.config, "vision_config", None)
    n_deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    path = next(name for name, module in model.named_modules() if module is decoder)
    part = TextPart(ARCHITECTURES[kind], decoder, path, head, config, n_deepstack)
    _check_rope(part)
    _check_tensors(part)
    return part


def _check_tensors(part: TextPart) -> None:
    """That the layout has a name for every tensor of the decoder."""
    known = {id(p) for _, module, _ in part.modules() for p in module.parameters()}
    known |= {id(p) for p in part.decoder.embed_tokens.parameters()}
    unknown = [name for name, p in part.decoder.named_parameters() if id(p) not in known]
    for _, module, name in part.modules():
        if getattr(module, "bias", None) is not None and _short(name) not in BIASED[part.architecture]:
            unknown.append(f"{name}.bias")
    if unknown:
        raise ValueError(
            f"llama.cpp's {part.architecture} has no place for {len(unknown)} tensors such as {unknown[0]}"
        )


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _check_rope(part: TextPart) -> None:
    rope = part.config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"gguf is written for rotary positions {', '.join(ROPE_TYPES)}, not for {rope}")


def write_header(writer: "GGUFWriter", part: TextPart, n_tokens: int) -> None:
    """Write the sizes."""
    config, rope = part.config, part.config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(part.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(part.head_dim)
    writer.add_value_length(part.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(part.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(n_tokens)
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0, 0][:4])
    if part.architecture == "qwen3vl":
        writer.add_uint32("qwen3vl.n_deepstack_layers", part.n_deepstack)


def rope_factors(part: TextPart) -> Tensor | None:
    """By what Llama 3 divides each frequency, (head_dim / 2,) float32; None for others."""
    rope = part.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, part.head_dim, 2).float() / part.head_dim
    plain = 1.0 / rope["rope_theta"] ** exponents
    return plain / part.decoder.rotary_emb.inv_freq.float().cpu()
