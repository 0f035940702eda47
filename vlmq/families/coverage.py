"""Which share of a model's parameters is quantized, and what keeps the rest: every parameter counts once."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vlmq.families.kept import TIED
from vlmq.families.layout import ALREADY_QUANTIZED, Layout
from vlmq.families.outside import EMBEDDINGS

QUANTIZED = "quantized"
NOT_PACKED = "not packed"


@dataclass(frozen=True)
class Share:
    """Some of a model's parameters.

    Attributes:
        what: "quantized", or what they are, or why the layers are kept.
        n_layers: linear layers among them.
        n_parameters: their number; those of a tied weight count with the embeddings, or with the first layer
            that holds it.
        share: of all parameters of the model.
    """

    what: str
    n_layers: int
    n_parameters: int
    share: float


def shares(
    layout: Layout,
    quantized: Collection[str],
    kept: Mapping[str, str],
    *,
    tables: Mapping[str, int] | None = None,
) -> list[Share]:
    """Divide all parameters of a model: first those quantized, then the others, the largest share first.

    Args:
        layout: of the model.
        quantized: names of linear layers.
        kept: why each other linear layer is kept.
        tables: layers that will hold a token embedding, and how many parameters that has.
    """
    layers: dict[str, list[int]] = {}
    for name, info in layout.linears.items():
        is_quantized = name in quantized
        is_elsewhere = (info.kept == TIED and not is_quantized) or info.repeats is not None
        what = QUANTIZED if is_quantized else kept[name]
        layers.setdefault(what, []).append(0 if is_elsewhere else info.n_parameters)
    counted = {what: [len(sizes), sum(sizes)] for what, sizes in layers.items()}
    counted |= {what: [0, n] for what, n in layout.others.items()}
    first = counted.pop(QUANTIZED, [0, 0])
    for name, n_parameters in (tables or {}).items():
        counted[EMBEDDINGS][1] -= n_parameters
        if name not in layout.linears:
            first = [first[0] + 1, first[1] + n_parameters]
    rest = sorted((item for item in counted.items() if any(item[1])), key=lambda item: -item[1][1])
    return [
        Share(what, *sizes, sizes[1] / layout.n_parameters) for what, sizes in ((QUANTIZED, first), *rest)
    ]


def shares_of_packed(layout: Layout) -> list[Share]:
    """The same for a model that is packed."""
    kept = {name: info.kept or NOT_PACKED for name, info in layout.linears.items()}
    packed = [name for name, reason in kept.items() if reason.startswith(ALREADY_QUANTIZED)]
    return shares(layout, packed, kept)


def describe_kept(found: list[Share]) -> list[str]:
    """One line for each share that is not quantized."""
    return [
        f"{f'{s.n_layers} layers ({s.what})' if s.n_layers else s.what}, {s.share:.1%} of all parameters"
        for s in found[1:]
    ]
