"""How much of each family of transformers vlmq quantizes: every model built on the meta device, and its plan read.

    python -m vlmq.eval.families [FAMILY ...] [--results eval/results/families.json] [--table docs/families.md]

The families are those of transformers' two tables: image-text-to-text and zero-shot image classification. Each is built
from its default config, or with the few values of `CHANGES` where the default one does not build. A family is covered
if blocks of each of its encoders and of its language model are found and at least 90 % of the parameters in linear
layers are in the plan, experts included; the output head and bridges between the parts are left out, as they are kept
unless an override names them. What a family lacks by its nature is in `LACKS`.
Nothing is computed, so a second or less goes for each. Three families have towers of timm, and need it and torchvision.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from vlmq.families import Layout
from vlmq.families.kept import NEVER_RUN, TIED
from vlmq.planning import plan

IMAGE_TEXT = "image-text"
DUAL = "dual encoder"
LEAST_SHARE = 0.9
CANNOT_BUILD = (ImportError, TypeError, ValueError, KeyError, AttributeError, IndexError)
LEFT_OUT = ("lm_head", TIED, NEVER_RUN)
TABLES: dict[str, Any] = {
    IMAGE_TEXT: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    DUAL: MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
CHANGES: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    },
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}},
    "gemma4": {"vision_config": {}},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-4, 8]], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "hidden_size": 1024,
            "model_args": {
                "embed_dim": 1024,
                "depth": 23,
                "img_size": [448, 448],
                "ref_feat_shape": [32, 32],
                "global_pool": "",
                "init_values": 0.1,
                "use_post_transformer_norm": False,
            },
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 16,
        }
    },
}
LACKS: dict[str, dict[str, str]] = {
    "align": {"vision": "all convolutions"},
    "chameleon": {"vision": "image tokens come from convolutions"},
    "evolla": {"vision": "reads proteins"},
    "fuyu": {"vision": "patches enter through one linear layer"},
    "gemma3n": {"vision": "all convolutions"},
    "gemma4_unified": {"vision": "patches enter through linear layers"},
    "mistral4": {"vision": "the default config is text only"},
    "udop": {"vision": "patches enter the text encoder"},
}


@dataclass(frozen=True)
class FamilyRow:
    """What was found in one family.

    Attributes:
        family: name of the model type.
        kind: IMAGE_TEXT or DUAL.
        model: name of the class.
        problem: why it is not covered; None if it is.
        n_parameters: of the model.
        stacks: path of each list of blocks -> "part, number of blocks".
        share: share of all parameters that the plan quantizes.
        linear_share: share of the parameters in linear layers and experts, without the output head and bridges.
        rest: the other parameters: what they are -> share.
        lacks: part that the family does not have -> why.
        changes: values changed in the default config.
    """

    family: str
    kind: str
    model: str
    problem: str | None
    n_parameters: int = 0
    stacks: dict[str, str] | None = None
    share: float = 0.0
    linear_share: float = 0.0
    rest: dict[str, float] | None = None
    lacks: dict[str, str] | None = None
    changes: dict[str, Any] | None = None


def families() -> list[tuple[str, str]]:
    """(kind, family) of both tables."""
    return [(kind, family) for kind, table in TABLES.items() for family in table]


def build(kind: str, family: str) -> PreTrainedModel:
    """The family's model on the meta device.

    Raises:
        ImportError: it needs a package that is not installed.
        Exception: whatever transformers raises for a config that does not build.
    """
    names = TABLES[kind][family]
    name = names if isinstance(names, str) else names[0]
    config = CONFIG_MAPPING[family](**CHANGES.get(family, {}))
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def examine(kind: str, family: str) -> FamilyRow:
    """Build a family and read its plan."""
    names = TABLES[kind][family]
    name = names if isinstance(names, str) else names[0]
    changes = CHANGES.get(family)
    try:
        model = build(kind, family)
    except (*CANNOT_BUILD, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        return FamilyRow(family, kind, name, f"does not build: {text[:120]}", changes=changes)
    try:
        steps = plan(model)
    except ValueError as error:
        return FamilyRow(family, kind, name, str(error), changes=changes)
    lacks = LACKS.get(family, {})
    found = steps.shares()
    linear_share = _linear_share(steps.layout, set(steps.schemes))
    return FamilyRow(
        family,
        kind,
        name,
        _problem(kind, steps.layout, lacks, linear_share),
        steps.layout.n_parameters,
        _stacks(model, steps.layout),
        found[0].share,
        linear_share,
        {share.what: share.share for share in found[1:]},
        lacks or None,
        changes,
    )


def _problem(kind: str, layout: Layout, lacks: dict[str, str], linear_share: float) -> str | None:
    present = {block.part for block in layout.blocks}
    wanted = ("vision", "language") if kind == IMAGE_TEXT else ("vision", "text")
    missing = [part for part in wanted if part not in present and part not in lacks]
    if missing:
        return f"no blocks of {' and '.join(missing)} were found"
    if linear_share < LEAST_SHARE:
        return f"{linear_share:.1%} of the parameters in linear layers are quantized"
    return None


def _linear_share(layout: Layout, quantized: set[str]) -> float:
    """Quantized parameters by all that lie in linear layers and experts, without the output head and bridges."""
    linears = sum(
        info.n_parameters
        for info in layout.linears.values()
        if info.kept not in LEFT_OUT and info.part != "projector" and info.repeats is None
    )
    experts = sum(expert.n_parameters for expert in layout.experts)
    n_quantized = sum(info.n_parameters for name, info in layout.linears.items() if name in quantized)
    return n_quantized / max(1, linears + experts)


def _stacks(model: nn.Module, layout: Layout) -> dict[str, str]:
    counts: dict[tuple[str, str], int] = {}
    for block in layout.blocks:
        path = block.name.rpartition(".")[0] if block.name[-1].isdecimal() else block.name
        counts[path, block.part] = counts.get((path, block.part), 0) + 1
    return {path: f"{part}, {n}" for (path, part), n in counts.items()}


def table(rows: list[FamilyRow]) -> str:
    """The rows as a page of Markdown."""
    lines = [
        "# Families",
        "",
        "Made by `python -m vlmq.eval.families` with transformers "
        f"{transformers.__version__} (and timm and torchvision, which",
        "fast_vlm, gemma3n and perception_lm need): every family of its tables, built on the meta device.",
        "*Linear*: share of the parameters in linear layers and experts, without the output head and the bridges",
        "between the parts, that `vlmq.quantize` packs by default. *All*: the same of all parameters, embeddings",
        "included. An override of `projector` quantizes the bridges too.",
    ]
    for kind, title in ((IMAGE_TEXT, "Image and text to text"), (DUAL, "Dual encoders")):
        members = [row for row in rows if row.kind == kind]
        n_covered = sum(row.problem is None for row in members)
        lines += ["", f"## {title}: {n_covered} of {len(members)} covered", ""]
        lines += ["| family | parameters | linear | all | blocks | notes |", "|---|--:|--:|--:|---|---|"]
        lines += [_line(row) for row in members]
    return "\n".join(lines) + "\n"


def _line(row: FamilyRow) -> str:
    if row.stacks is None:
        return f"| {row.family} | | | | | {row.problem} |"
    blocks = "<br>".join(f"`{path}` ({what})" for path, what in row.stacks.items())
    notes = [f"no {part}: {why}" for part, why in (row.lacks or {}).items()]
    notes += [row.problem] if row.problem else []
    notes += ["config changed"] if row.changes else []
    size = f"{row.n_parameters / 1e9:.2f} B"
    shares = f"{row.linear_share:.1%} | {row.share:.1%}"
    return f"| {row.family} | {size} | {shares} | {blocks} | {'; '.join(notes)} |"


def _chosen(names: list[str]) -> Iterator[tuple[str, str]]:
    known = {family for _, family in families()}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"no family {', '.join(unknown)}; known: {' '.join(sorted(known))}")
    return ((kind, family) for kind, family in families() if not names or family in names)


def main(arguments: list[str] | None = None) -> None:
    """Examine the families, print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m vlmq.eval.families")
    parser.add_argument("families", nargs="*", help="names of model types; all unless told")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    rows = []
    for kind, family in _chosen(given.families):
        rows.append(examine(kind, family))
        row = rows[-1]
        print(f"{family:<26} {row.linear_share:6.1%} {row.share:6.1%}  {row.problem or ''}", flush=True)
    for kind in TABLES:
        members = [row for row in rows if row.kind == kind]
        print(f"{kind}: {sum(row.problem is None for row in members)} of {len(members)} covered")
    if given.results is not None:
        record = {
            "command": "python -m vlmq.eval.families",
            "transformers": transformers.__version__,
            "seconds": round(time.perf_counter() - started, 1),
            "families": [{k: v for k, v in asdict(row).items() if v is not None} for row in rows],
        }
        given.results.write_text(json.dumps(record, indent=1) + "\n")
    if given.table is not None:
        given.table.write_text(table(rows))


if __name__ == "__main__":
    main()
