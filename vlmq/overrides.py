"""Overrides: which layers a pattern means, and whether they may have the scheme that it gives.

A pattern is a part of the model, a half of the blocks, or a shell pattern over full layer names; the last one that
matches a layer decides.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from vlmq.calib.saliency_residual import attention_modules, attention_of
from vlmq.families import PARTS, Layout
from vlmq.families.kept import FIXED_REASONS
from vlmq.families.layout import ALREADY_QUANTIZED
from vlmq.families.merged import merged_layers
from vlmq.families.packed import is_packed, scheme_name
from vlmq.scheme import Scheme

HALVES = ("attention", "ffn")
PRESETS: dict[str, dict[str, str | Scheme | None]] = {"Q-ALL": {}, "Q-FFN": {"attention": None}}


def read_overrides(
    given: Mapping[str, str | Scheme | None] | str | None,
) -> Mapping[str, str | Scheme | None]:
    """Overrides by pattern; those of a preset by its name.

    Raises:
        ValueError: no preset of that name.
    """
    if not isinstance(given, str):
        return given or {}
    if given not in PRESETS:
        raise ValueError(
            f"overrides {given!r} is no preset; known: {' '.join(PRESETS)}, or give pattern -> scheme"
        )
    return PRESETS[given]


def _half(pattern: str, layout: Layout, model: PreTrainedModel) -> list[str]:
    """Layers of the blocks, but those kept by default, inside the modules that mix tokens or outside of them."""
    matched = []
    for spec in layout.blocks:
        block = model.get_submodule(spec.name)
        mixers = attention_modules(block)
        for name, info in layout.linears.items():
            if info.block == spec.name and (info.kept or ALREADY_QUANTIZED).startswith(ALREADY_QUANTIZED):
                is_inside = attention_of(name.removeprefix(f"{spec.name}."), mixers) is not None
                matched += [name] if is_inside == (pattern == "attention") else []
    return matched


def match(pattern: str, layout: Layout, model: PreTrainedModel) -> list[str]:
    """Layers of a part, of a half, or layers whose full name fits the pattern.

    Raises:
        ValueError: nothing matches.
    """
    if pattern in PARTS:
        matched = [n for n, info in layout.linears.items() if info.part == pattern and info.block is not None]
    elif pattern in HALVES:
        matched = _half(pattern, layout, model)
    else:
        matched = [name for name in layout.linears if fnmatchcase(name, pattern)]
    if not matched:
        some = ", ".join(list(layout.linears)[:: max(1, len(layout.linears) // 4)][:4])
        raise ValueError(
            f"override {pattern!r} matches no linear layer; use a part ({' '.join(PARTS)}), a half "
            f"({' '.join(HALVES)}) or a pattern over full names such as {some}"
        )
    return matched


def check_experts(layout: Layout, schemes: Mapping[str, Scheme]) -> None:
    """Raise ValueError where some layers of fused experts would be packed, and others not."""
    members: dict[str, list[str]] = {}
    for name, info in layout.linears.items():
        if info.experts is not None:
            members.setdefault(info.experts, []).append(name)
    for path, names in members.items():
        left = [name for name in names if name not in schemes]
        if 0 < len(left) < len(names):
            raise ValueError(
                f"experts {path!r}: {len(left)} of {len(names)} layers would stay in full precision, such as "
                f"{left[0]!r}; fused experts are packed together or not at all (their schemes may differ): give "
                f"a scheme to all of them, or None to '{path}.*'"
            )


def check_merged(
    model: PreTrainedModel,
    layout: Layout,
    schemes: Mapping[str, Scheme],
    advice: str = "use an override that matches all of them, with one scheme or with None to keep them",
) -> None:
    """Raise ValueError where layers that are saved as one tensor would have different schemes, or be packed in part."""
    chosen: dict[str, str | None] = {}
    for name in (name for name, info in layout.linears.items() if info.experts is None):
        module = model.get_submodule(name)
        planned = schemes[name].name if name in schemes else None
        chosen[name] = scheme_name(module) if is_packed(module) else planned
    by_codes = merged_layers(model, chosen, "qweight")
    by_weights = merged_layers(model, chosen, "weight")
    differ = [group for group in by_codes if len({chosen[name] for name in group}) > 1]
    differ += [group for group in by_weights if len({chosen[name] is None for name in group}) > 1]
    if differ:
        given = ", ".join(f"{name!r} {chosen[name] or 'full precision'}" for name in differ[0])
        n_more = len({tuple(group) for group in differ}) - 1
        more = f" (groups like this: {n_more + 1})" if n_more else ""
        raise ValueError(
            f"transformers saves these layers as one tensor, so they need one scheme, but would have: {given}{more}; "
            f"{advice}"
        )


def check_possible(name: str, layout: Layout, scheme: Scheme | None, where: str) -> None:
    """Raise ValueError if a layer cannot have the scheme that `where` gives it."""
    info = layout.linears[name]
    if scheme is None:
        return
    if (info.kept or "").startswith(ALREADY_QUANTIZED):
        raise ValueError(
            f"{where}: layer {name!r} is {info.kept} and is not quantized again; start from the original model, or "
            "leave such layers to the scheme, which keeps them as they are"
        )
    if info.block is None or (info.kept or "").startswith(FIXED_REASONS):
        reason = info.kept or "outside the blocks"
        raise ValueError(f"{where}: layer {name!r} cannot be quantized ({reason}); give it None")
