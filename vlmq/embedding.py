"""Token embeddings and the output head, packed; one packed matrix serves both where their weights are tied.

On a small model the head is most of what is read for a token: of SmolLM2-135M's 270 MB in bfloat16 it is 57. The
rows of the matrix are the tokens' vectors, so a lookup unpacks only the rows that it needs:

    E[id] = row id of W,   logits = h W^T,   W[o, i] = sum_t s[o, g(i), t] (L[q[o, i], t] - z[o, g(i)])

Rows are rounded to nearest with the range of least squared error (`vlmq.solvers.rtn`); at 8 bits that costs no
measurable quality, so nothing is calibrated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmq.formats import QuantizedWeight
from vlmq.kernels import reference
from vlmq.linear import QuantLinear
from vlmq.scheme import Scheme
from vlmq.solvers.rtn import fit_groups

TABLE = "table"
CHUNK_ROWS = 4096


class QuantEmbedding(nn.Module):
    """An embedding whose rows are those of a packed layer.

    The packed layer is a child of its own, `table`, or the model's packed output head, which is then not registered a
    second time. `anchor` is an empty parameter in the model's dtype: transformers takes the dtype of a model from its
    first parameter, which this one often is.
    """

    anchor: nn.Parameter

    def __init__(self, rows: QuantLinear, *, is_own: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.anchor = nn.Parameter(
            torch.empty(0, dtype=dtype, device=rows.qweight.device), requires_grad=False
        )
        self._shared: list[QuantLinear] = []
        if is_own:
            self.table = rows
        else:
            self._shared = [rows]  # in a list, so that it is no child

    @property
    def rows(self) -> QuantLinear:
        """The packed layer whose rows are looked up."""
        return self._shared[0] if self._shared else self.table

    @property
    def num_embeddings(self) -> int:
        """Number of tokens."""
        return self.rows.out_features

    @property
    def embedding_dim(self) -> int:
        """Width of a token's vector."""
        return self.rows.in_features

    @property
    def weight(self) -> Tensor:
        """All vectors, (num_embeddings, embedding_dim), computed anew at each access; for reading only."""
        return self.rows.dequantize(self.anchor.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (...) int64; returns (..., embedding_dim) in the model's dtype.

        Raises:
            RuntimeError: the packed layer has been moved away from memory.
        """
        rows = self.rows
        if rows.qweight.is_meta:
            raise RuntimeError(
                "the output head that holds the token embedding is offloaded; keep it on a device"
            )
        flat = ids.flatten().to(rows.qweight.device)
        bound = rows.bound_to(self.anchor.new_empty(1, rows.in_features))
        if bound is not None:
            vectors = bound.look_up(flat, self.anchor.dtype)
        else:
            vectors = reference.dequantize(
                rows.qweight.index_select(0, flat),
                rows.scales.index_select(0, flat),
                None if rows.zeros is None else rows.zeros.index_select(0, flat),
                rows.format.name,
                rows.in_features,
                rows.group_size or 0,
                self.anchor.dtype,
            )
        return vectors.view(*ids.shape, rows.in_features).to(ids.device)

    def extra_repr(self) -> str:
        """Sizes, and whose rows are read."""
        return f"{self.num_embeddings}, {self.embedding_dim}, is_shared={bool(self._shared)}"


@dataclass(frozen=True)
class Embedding:
    """Paths of a model's token embedding and of its output head (None without one), and whether they are tied."""

    name: str
    head: str | None
    is_tied: bool

    def layers(self) -> list[str]:
        """Paths of the packed layers that take their place."""
        if self.head is None:
            return [f"{self.name}.{TABLE}"]
        return [self.head] if self.is_tied else [f"{self.name}.{TABLE}", self.head]

    def source(self) -> str:
        """Path of the packed layer whose rows are the embedding."""
        return self.layers()[0]

    def looked_up(self) -> dict[str, str]:
        """The entry of the config: path of the embedding -> path of the packed layer whose rows it reads."""
        return {self.name: self.source()}


def find_embedding(model: PreTrainedModel) -> Embedding:
    """Find the token embedding and the output head.

    Raises:
        ValueError: there is no token embedding, it or the head is of a kind whose forward does more than look up or
            multiply, or other weights are tied.
    """
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        module = None
    names = {id(m): name for name, m in model.named_modules()}
    if type(module) is not nn.Embedding or id(module) not in names:
        found = "none" if module is None else type(module).__name__
        raise ValueError(
            f"embeddings can only be packed where the token embedding is an nn.Embedding, found {found}"
        )
    head = model.get_output_embeddings()
    others = sorted(set(model.all_tied_weights_keys) - {f"{names.get(id(head))}.weight"})
    if others:
        raise ValueError(f"embeddings cannot be packed: {', '.join(others)} are tied to other weights")
    if head is None:
        return Embedding(names[id(module)], None, False)
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"the output head is a {type(head).__name__}; only an nn.Linear without bias is packed with the embedding"
        )
    return Embedding(names[id(module)], names[id(head)], head.weight is module.weight)


@torch.no_grad()
def round_rows(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round each group of (n_rows, width) to nearest, with the range of least squared error."""
    ones = torch.ones(weight.shape[1], device=weight.device)
    parts = [
        fit_groups(rows.float(), ones, scheme.format, scheme.group_size, n_steps=8)
        for rows in weight.split(CHUNK_ROWS)
    ]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        scheme.format,
        scheme.group_size,
    )


def pack_embedding(model: PreTrainedModel, found: Embedding, scheme: Scheme) -> None:
    """Replace the token embedding and the output head by packed ones; nothing is attached yet."""
    module: Any = model.get_submodule(found.name)
    dtype = module.weight.dtype
    table = QuantLinear.from_quantized(round_rows(module.weight, scheme), dtype=dtype)
    if found.head is not None:
        head: Any = model.get_submodule(found.head)
        packed = (
            table
            if found.is_tied
            else QuantLinear.from_quantized(round_rows(head.weight, scheme), dtype=dtype)
        )
        model.set_submodule(found.head, packed)
    model.set_submodule(found.name, QuantEmbedding(table, is_own=not found.is_tied, dtype=dtype))


def place_empty(model: PreTrainedModel, embeddings: Mapping[str, str], schemes: Mapping[str, Scheme]) -> None:
    """Put packed embeddings without values in place, on the meta device, before a checkpoint is read.

    Args:
        model: on the meta device; packed heads that serve an embedding are already in place.
        embeddings: path of each embedding -> path of the packed layer whose rows it reads.
        schemes: scheme of each packed layer.

    Raises:
        ValueError: the model has no such embedding or no such packed layer.
    """
    for name, source in embeddings.items():
        module: Any = submodule(model, name)
        if not isinstance(module, nn.Embedding) or source not in schemes:
            raise ValueError(
                f"{type(model).__name__} has no embedding {name!r} with packed rows {source!r}, which config.json lists"
            )
        is_own = source == f"{name}.{TABLE}"
        scheme = schemes[source]
        rows: Any = submodule(model, source)
        if is_own:
            sizes = module.embedding_dim, module.num_embeddings
            rows = QuantLinear(
                *sizes, scheme.format, scheme.group_size, dtype=module.weight.dtype, device="meta"
            )
        if not isinstance(rows, QuantLinear) or rows.out_features != module.num_embeddings:
            raise ValueError(f"embedding {name!r}: {source!r} is no packed layer with a row for each token")
        model.set_submodule(name, QuantEmbedding(rows, is_own=is_own, dtype=module.weight.dtype))


def dequantize_embeddings(
    model: PreTrainedModel, embeddings: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Put plain embeddings of the packed values in place; a shared head is left as it is."""
    for name in embeddings:
        packed: Any = model.get_submodule(name)
        weight = packed.rows.dequantize(dtype or packed.anchor.dtype)
        plain = nn.Embedding(packed.num_embeddings, packed.embedding_dim, device="meta")
        plain.weight = nn.Parameter(weight)
        model.set_submodule(name, plain)


def submodule(model: nn.Module, name: str) -> Any:
    """The module of that path, None if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
