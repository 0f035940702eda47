"""The plan: which layer is quantized to what, checked before any work starts.

Every linear layer inside the blocks of the language model, the text encoder and the vision tower is
quantized to the scheme; everything else is kept, with the reason, layers that are packed already among it.
Overrides change that: a pattern is a part ("vision", "projector", "language", "text"), a half of the blocks
("attention", "ffn"), or a shell pattern over full layer names; the last pattern that matches a layer decides, and None
keeps the layer in full precision. Two choices have names: "Q-FFN" quantizes the feed-forward layers only, "Q-ALL" all
layers of the blocks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from vlmq.attach import earlier_quantizer
from vlmq.embedding import Embedding, find_embedding
from vlmq.families import Layout, describe
from vlmq.families.coverage import Share, describe_kept, shares
from vlmq.families.kept import SHARED
from vlmq.families.layout import ALREADY_QUANTIZED
from vlmq.formats import n_groups
from vlmq.kernels.packing import row_bytes
from vlmq.overrides import check_experts, check_merged, check_possible, match, read_overrides
from vlmq.scheme import Scheme, parse_scheme
from vlmq.solvers import default_solver
from vlmq.solvers.recipe import check_format, complete, learned_options, split_options

EMBEDDING = "embedding"
EMBEDDING_SOLVER = "rtn"


@dataclass(frozen=True)
class Plan:
    """What `quantize` will do.

    `schemes`: the scheme of every layer that is quantized, by full name. `kept`: why each other linear
    layer stays. `bits`: stored bits of every quantized layer, `n_weights` its weights. `n_bytes_before` and
    `n_bytes_after`: size of all weights now and then, layers that are packed already and what is kept included.
    `embedding`: the token embedding and the output head where they are packed too; their layers are in `schemes`.
    """

    layout: Layout
    schemes: dict[str, Scheme]
    kept: dict[str, str]
    bits: dict[str, int]
    n_weights: dict[str, int]
    n_bytes_before: int
    n_bytes_after: int
    embedding: Embedding | None = None

    @property
    def coverage(self) -> float:
        """Share of all parameters of the model that the plan quantizes; experts count as parameters."""
        return sum(self.n_weights.values()) / self.layout.n_parameters

    @property
    def true_bits_per_weight(self) -> float:
        """All stored bits (codes, padding, scales, zero points) per quantized weight."""
        return sum(self.bits.values()) / max(1, sum(self.n_weights.values()))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part and scheme: part, scheme, n_layers, n_weights, true_bits_per_weight."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, scheme in self.schemes.items():
            groups.setdefault((self.part_of(name), scheme.name), []).append(name)
        rows = []
        for (part, scheme), names in sorted(groups.items()):
            weights = sum(self.n_weights[name] for name in names)
            bits = sum(self.bits[name] for name in names) / weights
            rows.append(
                {
                    "part": part,
                    "scheme": scheme,
                    "n_layers": len(names),
                    "n_weights": weights,
                    "true_bits_per_weight": bits,
                }
            )
        return rows

    def part_of(self, name: str) -> str:
        """Part of a layer that is quantized; `EMBEDDING` for the token embedding and the output head."""
        if self.embedding is not None and name in self.embedding.layers():
            return EMBEDDING
        return self.layout.linears[name].part

    def in_blocks(self) -> dict[str, Scheme]:
        """The schemes of the layers in the blocks."""
        packed = [] if self.embedding is None else self.embedding.layers()
        return {name: scheme for name, scheme in self.schemes.items() if name not in packed}

    def warnings(self) -> list[str]:
        """What a user must know before the hours are spent, one line each."""
        lines = []
        experts = sum(expert.n_parameters for expert in self.layout.experts)
        if experts:
            share = experts / self.layout.n_parameters
            names = ", ".join(expert.name for expert in self.layout.experts[:3])
            lines.append(
                f"{share:.1%} of all parameters are experts in 3-D tensors of a layout that is NOT quantized: {names}"
                + (" ..." if len(self.layout.experts) > 3 else "")
            )
        shared = [f for f in self.shares() if f.what == SHARED]
        if shared:
            lines.append(
                f"{shared[0].share:.1%} of all parameters are weights that layers share: NOT quantized"
            )
        return lines

    def shares(self) -> list[Share]:
        """All parameters of the model: quantized, kept and why, and what lies outside of linear layers."""
        packed = self.embedding
        tables = {} if packed is None else {packed.source(): self.n_weights[packed.source()]}
        return shares(self.layout, self.schemes, self.kept, tables=tables)

    def __str__(self) -> str:
        """The plan as text: parts, what is kept and why, coverage, bits, size."""
        lines = [
            f"{row['part']:<10} {row['scheme']:<16} {row['n_layers']:>5} layers {row['n_weights']:>14,} weights "
            f"{row['true_bits_per_weight']:.3f} true bits"
            for row in self.rows()
        ]
        lines += [f"kept: {line}" for line in describe_kept(self.shares())]
        lines += [f"warning: {text}" for text in self.warnings()]
        lines.append(
            f"covers {self.coverage:.1%} of all parameters at {self.true_bits_per_weight:.3f} true bits per weight; "
            f"{self.n_bytes_before / 1e6:.1f} MB -> {self.n_bytes_after / 1e6:.1f} MB"
        )
        return "\n".join(lines)


def _count_reasons(kept: Mapping[str, str]) -> list[str]:
    return [f"kept: {count} layers ({reason})" for reason, count in sorted(Counter(kept.values()).items())]


def stored_bits(out_features: int, in_features: int, scheme: Scheme) -> int:
    """Bits that a packed matrix takes: codes with their padding, float16 scales, zero point bytes."""
    groups = n_groups(in_features, scheme.group_size)
    per_group = 16 * scheme.format.n_terms + 8 * scheme.format.has_zero
    return out_features * (8 * row_bytes(in_features, scheme.format.bits) + groups * per_group)


def plan(
    model: PreTrainedModel,
    scheme: str | Scheme = "int4-g128",
    *,
    solver: str | None = None,
    overrides: Mapping[str, str | Scheme | None] | str | None = None,
    options: Mapping[str, Any] | None = None,
    embeddings: str | Scheme | None = None,
) -> Plan:
    """Check every name, shape and option, and say what `quantize` would do; nothing is changed.

    Args:
        model: any transformers model; parameters may be on the meta device.
        scheme: the scheme of all layers that no override names.
        solver: a recipe such as "gptq+cd"; None takes the default of each format.
        overrides: part, half or pattern -> scheme, or None to keep the layer; or the name of one of PRESETS.
        options: options of the solver.
        embeddings: scheme of the token embedding and the output head; None keeps them.

    Raises:
        ValueError: an unknown format, group size, solver or option; a solver that is not meant for a
            layer's format; a pattern that matches no layer; a layer that cannot be quantized; different schemes for
            layers that are saved as one tensor; nothing to quantize.
        TypeError: the model or a scheme has the wrong type.
    """
    earlier_quantizer(model)
    layout = describe(model)
    default = _with_solver(parse_scheme(scheme), solver, options, "scheme")
    chosen: dict[str, Scheme | None] = {
        name: default if info.kept is None else None for name, info in layout.linears.items()
    }
    kept = {name: info.kept for name, info in layout.linears.items() if info.kept is not None}
    sources = dict.fromkeys(layout.linears, "scheme")
    for pattern, value in read_overrides(overrides).items():
        matched = match(pattern, layout, model)
        where = f"override {pattern!r} (matches {len(matched)} layers)"
        given = None
        if value is not None:
            given = _with_solver(parse_scheme(value, where=where), solver, options, f"override {pattern!r}")
        for name in matched:
            check_possible(name, layout, given, where)
            chosen[name], sources[name] = given, f"override {pattern!r}"
            if not (layout.linears[name].kept or "").startswith(ALREADY_QUANTIZED):
                kept[name] = f"override {pattern!r}"
    schemes = {name: given for name, given in chosen.items() if given is not None}
    check_experts(layout, schemes)
    check_merged(model, layout, schemes)
    if not schemes:
        raise ValueError(f"nothing is left to quantize; {'; '.join(_count_reasons(kept))}")
    kept = {name: reason for name, reason in kept.items() if name not in schemes}
    bits, n_weights, n_bytes_dense = {}, {}, 0
    for name, given in schemes.items():
        where = f" ({sources[name]} gives {given.name!r} to layer {name!r})"
        check_format(str(given.solver), given.format, where=where)
        info = layout.linears[name]
        bits[name] = stored_bits(info.out_features, info.in_features, given)
        n_weights[name] = info.n_parameters
        n_bytes_dense += info.n_bytes
    found = None
    if embeddings is not None:
        found = find_embedding(model)
        given = parse_scheme(embeddings, where="embeddings")
        module: Any = model.get_submodule(found.name)
        for name in found.layers():
            schemes[name] = replace(given, solver=EMBEDDING_SOLVER)
            kept.pop(name, None)
            bits[name] = stored_bits(module.num_embeddings, module.embedding_dim, given)
            n_weights[name] = module.weight.numel()
            n_bytes_dense += module.weight.numel() * module.weight.element_size()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    after = size - n_bytes_dense + sum(bits.values()) // 8
    return Plan(layout, schemes, kept, bits, n_weights, size, after, found)


def _with_solver(
    scheme: Scheme, solver: str | None, options: Mapping[str, Any] | None, source: str
) -> Scheme:
    """Fill in the recipe and check that it takes the options; `source` is what the scheme was given by."""
    recipe = complete(scheme.solver or solver or default_solver(scheme.format), scheme.format)
    merged = {**scheme.options, **(options or {})}
    split_options(recipe, merged, where=f" ({source} {scheme.name!r})")
    completed = replace(scheme, solver=recipe, options=merged)
    learned_options(completed)
    return completed
