"""The families whose vision part llama.cpp knows: one function each, from a model to its layout.

A part that holds anything the layout has no name for is refused, so nothing is left out in silence. Facts about
llama.cpp are those of its version of October 2026, tools/mtmd.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmq.exports.gguf_layout import TextPart, text_part
from vlmq.exports.mmproj_layout import (
    LAYERS,
    Lone,
    VisionPart,
    alternate_halves,
    block_pieces,
    class_row_last,
    n_used,
    pieces_of,
    tower_sizes,
)
from vlmq.linear import QuantLinear

ALONE = "--text-only (in Python text_only=True) writes the text part alone"
CLASS_TOKEN = (
    "llama.cpp shows the tower's class token in place of the first patch of a picture (its issue 25814), so answers "
    "differ from vlmq's; without a class token, as with SigLIP, they do not"
)


def llava(model: PreTrainedModel) -> VisionPart:
    """CLIP or SigLIP, and two layers with GELU between."""
    config = model.config
    tower, kind = "model.vision_tower", config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"of LLaVA gguf is written for CLIP and SigLIP towers, this one is {kind!r}")
    has_class = kind == "clip_vision_model"
    if config.vision_feature_select_strategy != ("default" if has_class else "full"):
        raise ValueError(
            f"llama.cpp leaves out the class token and nothing else; {kind} here has vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r}"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError("llama.cpp's projector of LLaVA has gelu and biases, this one has not")
    n_layers = n_used(model)
    pieces = pieces_of(
        model, tower, {"embeddings.patch_embedding": "v.patch_embd", "pre_layrnorm": "v.pre_ln"}
    )
    pieces += block_pieces(model, f"{tower}.encoder.layers", n_layers, LAYERS)
    pieces += pieces_of(model, "model.multi_modal_projector", {"linear_1": "mm.0", "linear_2": "mm.2"})
    position = f"{tower}.embeddings.position_embedding.weight"
    lone = [Lone("v.position_embd.weight", position, class_row_last if has_class else torch.Tensor.detach)]
    if has_class:
        lone.append(Lone("v.class_embd", f"{tower}.embeddings.class_embedding"))
    unused = [f"{tower}.post_layernorm", f"{tower}.head"]
    unused += [f"{tower}.encoder.layers.{i}" for i in range(n_layers, config.vision_config.num_hidden_layers)]
    eps = config.vision_config.layer_norm_eps
    sizes = tower_sizes(model, n_layers, eps=eps, feature_layer=[n_layers])
    notes = (CLASS_TOKEN,) if has_class else ()
    return VisionPart("mlp", tuple(pieces), tuple(lone), sizes, tuple(unused), notes)


def idefics3(model: PreTrainedModel) -> VisionPart:
    """SigLIP; each square of patches becomes one token, by one matrix. SmolVLM too."""
    vision, tower = model.config.vision_config, "model.vision_model"
    n_layers = vision.num_hidden_layers
    pieces = pieces_of(
        model, tower, {"embeddings.patch_embedding": "v.patch_embd", "post_layernorm": "v.post_ln"}
    )
    pieces += block_pieces(model, f"{tower}.encoder.layers", n_layers, LAYERS)
    pieces += pieces_of(model, "model.connector.modality_projection", {"proj": "mm.model.fc"})
    lone = Lone("v.position_embd.weight", f"{tower}.embeddings.position_embedding.weight")
    sizes = tower_sizes(model, n_layers, eps=vision.layer_norm_eps)
    sizes["clip.vision.projector.scale_factor"] = int(model.config.scale_factor)
    return VisionPart("idefics3", tuple(pieces), (lone,), sizes)


def qwen2_vl(model: PreTrainedModel) -> VisionPart:
    """Patches of two frames, rotary positions, four patches joined to a token; 2.5 looks through windows."""
    vision, tower = model.config.vision_config, "model.visual"
    is_first = model.config.model_type == "qwen2_vl"
    if (vision.temporal_patch_size, vision.spatial_merge_size) != (2, 2):
        raise ValueError("llama.cpp joins two frames and squares of two patches, this tower does not")
    names = {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.qkv": ("attn_q", "attn_k", "attn_v"),
        "attn.proj": "attn_out",
    }
    inner = ("fc1", "", "fc2") if is_first else ("up_proj", "gate_proj", "down_proj")
    names |= {f"mlp.{n}": w for n, w in zip(inner, ("ffn_up", "ffn_gate", "ffn_down"), strict=True) if n}
    pieces = block_pieces(model, f"{tower}.blocks", vision.depth, names)
    pieces += pieces_of(model, f"{tower}.merger", {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"})
    other = {}
    if is_first:
        other = {"width": vision.embed_dim, "feed_forward_length": int(vision.embed_dim * vision.mlp_ratio)}
    sizes = tower_sizes(model, vision.depth, eps=1e-6, **other)
    if not is_first:
        sizes["clip.vision.n_wa_pattern"] = _window_pattern(vision)
    return VisionPart(
        "qwen2vl_merger" if is_first else "qwen2.5vl_merger", tuple(pieces), _two_frames(tower), sizes
    )


def _two_frames(tower: str) -> tuple[Lone, Lone]:
    """The kernel of two frames as one for each."""
    path = f"{tower}.patch_embed.proj.weight"
    return (
        Lone("v.patch_embd.weight", path, lambda kernel: kernel.detach()[:, :, 0]),
        Lone("v.patch_embd.weight.1", path, lambda kernel: kernel.detach()[:, :, 1]),
    )


def _window_pattern(vision: Any) -> int:
    """Every how manieth block sees the whole picture; the others see windows of 112 pixels."""
    whole = list(vision.fullatt_block_indexes)
    pattern = whole[0] + 1 if whole else 0
    if not pattern or whole != list(range(pattern - 1, vision.depth, pattern)) or vision.window_size != 112:
        raise ValueError(
            "llama.cpp knows windows of 112 pixels and each n-th block with the whole picture; this tower has windows "
            f"of {vision.window_size} and blocks {whole} of {vision.depth}"
        )
    return pattern


def qwen3_vl(model: PreTrainedModel) -> VisionPart:
    """As Qwen2-VL, with a table of positions, and features of some blocks for the first layers of the decoder."""
    vision, tower = model.config.vision_config, "model.visual"
    if (vision.temporal_patch_size, vision.spatial_merge_size) != (2, 2):
        raise ValueError("llama.cpp joins two frames and squares of two patches, this tower does not")
    names = {"norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn_qkv", "attn.proj": "attn_out"}
    names |= {"mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down"}
    pieces = block_pieces(model, f"{tower}.blocks", vision.depth, names)
    pieces += pieces_of(
        model, f"{tower}.merger", {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
    )
    for i, block in enumerate(vision.deepstack_visual_indexes):
        names = {n: f"v.deepstack.{block}.{w}" for n, w in DEEPSTACK.items()}
        pieces += pieces_of(model, f"{tower}.deepstack_merger_list.{i}", names)
    lone = (
        *_two_frames(tower),
        Lone("v.patch_embd.bias", f"{tower}.patch_embed.proj.bias"),
        Lone("v.position_embd.weight", f"{tower}.pos_embed.weight"),
    )
    side = round(vision.num_position_embeddings**0.5) * vision.patch_size
    sizes = tower_sizes(model, vision.depth, eps=1e-6, image_size=side)
    is_deep = [i in vision.deepstack_visual_indexes for i in range(vision.depth)]
    sizes["clip.vision.is_deepstack_layers"] = is_deep
    return VisionPart("qwen3vl_merger", tuple(pieces), lone, sizes)


DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def internvl(model: PreTrainedModel) -> VisionPart:
    """InternViT with a class token, squares of patches joined, a norm and two layers with GELU between."""
    config, tower = model.config, "model.vision_tower"
    vision = config.vision_config
    if vision.norm_type != "layer_norm" or vision.use_qk_norm:
        raise ValueError(
            "of InternVL's towers gguf is written for those with layer_norm and no norm of queries, this one has "
            f"{vision.norm_type!r}, use_qk_norm {vision.use_qk_norm}"
        )
    if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
        raise ValueError("llama.cpp reads the last block of InternVL's tower without its class token")
    n_layers = vision.num_hidden_layers
    pieces = pieces_of(
        model, tower, {"embeddings.patch_embeddings.projection": "v.patch_embd", "layernorm": "v.post_ln"}
    )
    pieces += block_pieces(model, f"{tower}.encoder.layer", n_layers, INTERNVL)
    projector = {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"}
    pieces += pieces_of(model, "model.multi_modal_projector", projector)
    lone = [
        Lone("v.class_embd", f"{tower}.embeddings.cls_token", lambda token: token.detach().flatten()),
        Lone("v.position_embd.weight", f"{tower}.embeddings.position_embeddings", class_row_last),
    ]
    for i in range(n_layers):
        lone += [Lone(f"v.blk.{i}.ls{j}.weight", f"{tower}.encoder.layer.{i}.lambda_{j}") for j in (1, 2)]
    sizes = tower_sizes(model, n_layers, eps=vision.layer_norm_eps)
    sizes["clip.vision.projector.scale_factor"] = round(1 / config.downsample_ratio)
    return VisionPart("internvl", tuple(pieces), tuple(lone), sizes)


INTERNVL = {
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.projection_layer": "attn_out",
    "layernorm_before": "ln1",
    "layernorm_after": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def mistral3(model: PreTrainedModel) -> VisionPart:
    """Pixtral's tower with rotary positions, squares of patches joined, and two layers with GELU between."""
    config, tower = model.config, "model.vision_tower"
    vision = config.vision_config
    if vision.model_type != "pixtral" or config.projector_hidden_act != "gelu":
        raise ValueError(
            f"of Mistral 3 gguf is written for Pixtral towers and gelu, this one has {vision.model_type!r} and "
            f"{config.projector_hidden_act!r}"
        )
    if vision.rope_parameters["rope_theta"] != 1e4:
        raise ValueError("llama.cpp rotates Pixtral's towers with a base of 10000, this one has another")
    n_layers = n_used(model)
    pieces = pieces_of(model, tower, {"patch_conv": "v.patch_embd", "ln_pre": "v.pre_ln"})
    blocks = block_pieces(model, f"{tower}.transformer.layers", n_layers, PIXTRAL)
    pieces += alternate_halves(blocks, vision.head_dim)
    names = {"norm": "mm.input_norm", "patch_merger.merging_layer": "mm.patch_merger"}
    names |= {"linear_1": "mm.1", "linear_2": "mm.2"}
    pieces += pieces_of(model, "model.multi_modal_projector", names)
    sizes = tower_sizes(model, n_layers, eps=1e-5)
    sizes["clip.vision.spatial_merge_size"] = config.spatial_merge_size
    unused = [f"{tower}.transformer.layers.{i}" for i in range(n_layers, vision.num_hidden_layers)]
    return VisionPart("pixtral", tuple(pieces), (), sizes, tuple(unused))


PIXTRAL = {
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_out",
    "attention_norm": "ln1",
    "ffn_norm": "ln2",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.down_proj": "ffn_down",
}

FAMILIES: dict[str, Callable[[PreTrainedModel], VisionPart]] = {
    "llava": llava,
    "smolvlm": idefics3,
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "mistral3": mistral3,
}


def vision_part(model: PreTrainedModel) -> VisionPart | None:
    """Find the vision part, and check that the layout can say it; None for a model of text.

    Raises:
        ValueError: it cannot; the message says why.
    """
    outside = set(_outside(model, text_part(model)))
    if not outside:
        return None
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"gguf is written with the vision part of {', '.join(FAMILIES)}; this model is {kind!r}: {ALONE}"
        )
    part = FAMILIES[kind](model)
    known = (*part.unused, *(p.path for p in part.pieces), *(p.path for p in part.lone))
    unknown = [
        name for name in sorted(outside) if not any(name == k or name.startswith(f"{k}.") for k in known)
    ]
    if unknown:
        raise ValueError(
            f"llama.cpp's {part.projector} has no place for {len(unknown)} tensors such as {unknown[0]}: {ALONE}"
        )
    return part


def _outside(model: PreTrainedModel, text: TextPart) -> list[str]:
    """Paths of all parameters and packed layers beside the text part."""
    inside = [f"{name}." for name, m in model.named_modules() if m is text.decoder or m is text.head]
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    return [name for name in names if not f"{name}.".startswith(tuple(inside))]
