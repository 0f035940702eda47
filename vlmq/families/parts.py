"""Words of a module's path that tell which part of a model it belongs to.

A family is data here, never a copy of its forward: the words cover the families of transformers, and the last
word of a path that says something decides (`model.encoder.vision_tower.encoder.layers` is vision). `EXCEPTIONS` names
the paths that they do not say, `NEVER_RUN` what no input reaches.
"""

import re

from torch import nn
from transformers import PreTrainedModel

PARTS = ("vision", "projector", "language", "text")
AUDIO = "audio"

_PROJECTOR = re.compile(
    r"projector|connector|merger|aligner|adapter|resampler|abstractor|qformer|perceiver"
    r"|embed_vision|embed_images|mm_proj|projection$",
    re.IGNORECASE,
)
_WORDS = {
    **dict.fromkeys(("vision", "visual", "image", "images", "video", "vit", "pixel", "vqmodel"), "vision"),
    **dict.fromkeys(("text", "language", "llm", "lm", "decoder"), "language"),
    **dict.fromkeys(("audio", "speech", "sound"), AUDIO),
}
# Where no word says it, or a wrong one: class of the model -> path in it -> part of all below.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "Blip2ForImageTextRetrieval": {"qformer": "text"},
    "Emu3ForConditionalGeneration": {"model.vqmodel": "vision"},
    "Emu3Model": {"vqmodel": "vision"},
}
# Class of the model -> modules that its forward never runs: BLIP's text encoder is handed no image in a dual encoder.
NEVER_RUN: dict[str, re.Pattern[str]] = {
    "BlipModel": re.compile(r"text_model\.encoder\.layer\.\d+\.crossattention\."),
}
_CLASS = re.compile(r"Vision|Visual|ViT|Image")
_DECODER_CLASS = re.compile(r"Decoder|CausalLM|ConditionalGeneration")


def is_projector_name(name: str) -> bool:
    """Whether the last component of a path names a bridge from image features to the language model."""
    return _PROJECTOR.search(name.rpartition(".")[2]) is not None


def never_run(model: PreTrainedModel, name: str) -> bool:
    """Whether the module at path `name` is there but never run by a model of this class."""
    pattern = NEVER_RUN.get(type(model).__name__)
    return pattern is not None and pattern.match(name) is not None


def part_of(model: PreTrainedModel, name: str, module: nn.Module) -> str:
    """The part ("vision", "projector", "language", "text" or "audio") of the module at path `name`.

    "text" is the text encoder of a dual encoder; a text stack that predicts tokens is "language".
    """
    for path, part in EXCEPTIONS.get(type(model).__name__, {}).items():
        if f"{name}.".startswith(f"{path}."):
            return part
    components = name.split(".")
    if any(is_projector_name(component) for component in components):
        return "projector"
    for component in reversed(components):
        for word in reversed(component.lower().split("_")):
            if word in _WORDS:
                part = _WORDS[word]
                return _language_or_text(model, module) if part == "language" else part
    if _CLASS.search(type(module).__name__) or _owner(model, name).main_input_name == "pixel_values":
        return "vision"
    return _language_or_text(model, module)


def _language_or_text(model: PreTrainedModel, module: nn.Module) -> str:
    predicts_tokens = model.can_generate() or model.get_output_embeddings() is not None
    if predicts_tokens or _DECODER_CLASS.search(type(module).__name__):
        return "language"
    return "text"


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost pretrained model that holds the module at `name`."""
    owner: nn.Module = model
    module: nn.Module = model
    for component in name.split("."):
        module = getattr(module, component)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner  # type: ignore[return-value]
