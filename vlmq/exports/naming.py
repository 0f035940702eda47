"""Names and patterns by which other engines tell quantized layers from kept ones.

compressed-tensors matches a list of class names, full names, and "re:" patterns from the start of a name, against the
names that the reader uses: in transformers those in memory, in other engines those on disk or their own, with other
words before the number of the block ("model.language_model.layers.0", "language_model.model.layers.0"). So a whole
part is named by a word of its path, which all namings share ("re:.*vision_tower.*"), wherever that word is in no
packed layer's name; a single layer by the end of its path, from the block on, and where another part has a layer of
the same end by a word before it as well.
"""

import re
from collections.abc import Mapping, Sequence

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def name_pattern(name: str, disk: Mapping[str, str]) -> str:
    """What matches one layer under its name in memory, on disk, or in an engine.

    Args:
        name: in memory.
        disk: {name in memory: name on disk} of all layers that the pattern must tell apart.
    """
    return name if name == disk[name] else f"re:{_pattern(name, disk)}$"


def inside(path: str, disk: Mapping[str, str]) -> str:
    """What matches all layers of a module that holds experts, under the same names."""
    return rf"re:{_pattern(path, disk)}\.\d+\..*"


def _pattern(name: str, disk: Mapping[str, str]) -> str:
    head, tail = _cut(name)
    tails = "|".join(re.escape(t) for t in dict.fromkeys((tail, _cut(disk[name])[1])))
    rivals = [other for other in disk if other != name and f".{other}".endswith(f".{tail}")]
    if not rivals:
        return rf"(?:.*\.)?(?:{tails})"
    word = next((w for w in reversed(head) if not any(w in other.split(".") for other in rivals)), None)
    if word is None:
        return f"(?:{re.escape(name)}|{re.escape(disk[name])})"
    return rf"(?:(?:.*\.)?{re.escape(word)}\.(?:.*\.)?(?:{tails})|{re.escape(disk[name])})"


def block_tail(name: str) -> str:
    """The end of a path, from its numbered block on: what all namings share."""
    return _cut(name)[1]


def _cut(name: str) -> tuple[list[str], str]:
    """The words before the numbered block and the rest of a path; of a path without numbers its last word."""
    words = name.split(".")
    start = next((i - 1 for i, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return words[:start], ".".join(words[start:])


def ignore_list(kept: Sequence[str], packed: Mapping[str, str], disk: Mapping[str, str]) -> list[str]:
    """Patterns that match every kept layer and no packed one.

    Args:
        kept: names in memory of layers in full precision.
        packed: {name in memory: name on disk} of the packed layers.
        disk: the same for all layers.
    """
    taken = [name for pair in packed.items() for name in pair]
    patterns: dict[str, None] = {}
    for name in kept:
        words = [word for word in name.split(".") if not word.isdigit()]
        free = next((w for w in words if not any(w in other for other in taken)), None)
        patterns[name_pattern(name, disk) if free is None else f"re:.*{re.escape(free)}.*"] = None
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
