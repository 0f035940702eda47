"""Layers that transformers stores as one tensor: what its conversions split on a load, they merge again on a save.

Kimi K2.5 and Nemotron-H Omni hold q, k and v of the vision tower as one matrix on disk. Which layers of a model these
are is read off the model's own conversions, run backwards as `save_pretrained` runs them; there is no list of names.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter


def merged_layers(model: PreTrainedModel, names: Iterable[str], leaf: str) -> list[list[str]]:
    """Groups of layers, of those named, whose tensors `leaf` become one tensor when the model is saved.

    Args:
        model: its parameters may be on the meta device.
        names: full names of layers.
        leaf: last name of a tensor, such as "weight"; a family may merge the weights and nothing else.
    """
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    backwards = [c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in names:
        renamed = (converter.rename_source_key(f"{name}.{leaf}") for converter in backwards)
        stored = next((key for key, pattern in renamed if pattern is not None), None)
        if stored is not None:
            groups.setdefault(stored, []).append(name)
    return [group for group in groups.values() if len(group) > 1]
