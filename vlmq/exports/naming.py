"""Names and patterns by which other engines tell quantized layers from kept ones.

compressed-tensors matches a list of class names, full names, and "re:" patterns from the start of a name, against the
names that the reader uses: in transformers those in memory, in other engines those on disk or their own. So a whole
part is named by a word of its path, which all namings share ("re:.*vision_tower.*"), wherever that word is in no
packed layer's name; for single layers a pattern gives both names, where they differ.
"""

import re
from collections.abc import Mapping, Sequence

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def name_pattern(name: str, on_disk: str) -> str:
    """What matches one layer, under its name in memory or on disk."""
    return name if name == on_disk else f"re:(?:{re.escape(name)}|{re.escape(on_disk)})$"


def ignore_list(kept: Sequence[str], packed: Mapping[str, str], disk: Mapping[str, str]) -> list[str]:
    """Patterns that match every kept layer and no packed one.

    Args:
        kept: names in memory of linear layers in full precision.
        packed: {name in memory: name on disk} of the packed layers.
        disk: the same for the kept layers.
    """
    taken = [name for pair in packed.items() for name in pair]
    patterns: dict[str, None] = {}
    for name in kept:
        words = [word for word in name.split(".") if not word.isdigit()]
        free = next((w for w in words if not any(w in other for other in taken)), None)
        if free is not None:
            patterns[f"re:.*{re.escape(free)}.*"] = None
        else:
            patterns[name_pattern(name, disk[name])] = None
    return list(patterns)


def fused_groups(packed: Sequence[str], kept: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Layers that other engines run as one, so that they must share a scheme.

    Args:
        packed: names of packed layers.
        kept: names of linear layers in full precision.

    Returns:
        groups of two and more packed layers, and the names of those of which a partner is kept.
    """
    children: dict[str, set[str]] = {}
    for name in (*packed, *kept):
        parent, _, last = name.rpartition(".")
        children.setdefault(parent, set()).add(last)
    known, groups, torn = set(packed), [], []
    for parent, lasts in children.items():
        for fused in FUSED:
            group = [f"{parent}.{last}" for last in fused if last in lasts]
            inside = [name for name in group if name in known]
            if len(inside) > 1:
                groups.append(inside)
            if inside and len(inside) < len(group):
                torn += inside
    return groups, torn
