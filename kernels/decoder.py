"""Decoder layers for one new token of each sequence, in one call of the C library (csrc/decoder.h).

    h = x + o(attention(rotate(norm_q(q(norm x))), keys, values)),    out = h + down(silu(gate(norm' h)) * up(norm' h))

where norm is RMSNorm, q and k may be turned by their positions, and the norms of single
heads may be absent. Between two products torch would start a dozen operators, which take longer than the
products of a small model. Every step is rounded to the dtype as torch rounds it.
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vlmq.kernels.attention import MULTIPLE, is_plain_mask, isa_index
from vlmq.kernels.cpu import DTYPES, MAX_TOKENS, BoundLayer

N_LAYERS = 7
"""Queries, keys, values, output of attention, gate, up, down."""


class Norm(NamedTuple):
    """An RMSNorm: a weight (n,), and what is added to the mean of squares."""

    weight: Tensor
    eps: float


class Sizes(NamedTuple):
    """Heads of queries, heads of keys and values, and numbers in each; factor of the products of q and k."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float


class DecoderRecord(ctypes.Structure):
    """`vlmq_decoder` of csrc/vlmq_cpu.h."""

    _fields_ = (
        ("layers", ctypes.c_void_p * N_LAYERS),
        ("norms", ctypes.c_void_p * 4),
        ("eps", ctypes.c_float * 4),
        ("scale", ctypes.c_float),
        ("hidden", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("n_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("turns", ctypes.c_int32),
    )


class PastRecord(ctypes.Structure):
    """`vlmq_past` of csrc/vlmq_cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_batch", "key_head", "key_token")),
        *((name, ctypes.c_int64) for name in ("value_batch", "value_head", "value_token")),
    )


class TokenRecord(ctypes.Structure):
    """`vlmq_token` of csrc/vlmq_cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "mask")),
        *((name, ctypes.c_int64) for name in ("n_batch", "n_past", "turn_batch", "mask_batch", "mask_head")),
    )


class Past:
    """Keys and values of a layer, with room for more tokens; it holds the tensors.

    Args:
        keys: (n_batch, n_kv_heads, n_room, head_dim), of any strides.
        values: likewise.
        n_tokens: how many there are; who writes more counts them.
    """

    def __init__(self, keys: Tensor, values: Tensor, n_tokens: int = 0) -> None:
        self.keys = keys
        self.values = values
        self.n_tokens = n_tokens
        self.is_inference = keys.is_inference() or values.is_inference()
        self.n_room = min(keys.shape[-2], values.shape[-2])
        self.kinds = _kind_of(keys), _kind_of(values)

    def __reduce__(self) -> tuple[type, tuple[Tensor, Tensor, int]]:
        return Past, (self.keys, self.values, self.n_tokens)  # addresses mean nothing in a copy

    @cached_property
    def record(self) -> PastRecord:
        """Where the tensors lie; only for those of four dimensions."""
        steps = *self.keys.stride()[:3], *self.values.stride()[:3]
        return PastRecord(self.keys.data_ptr(), self.values.data_ptr(), *steps)


class Token(NamedTuple):
    """One new token of each sequence, as decoder layers take it.

    x: (n_batch, 1, hidden), contiguous, at most 16 sequences.
    turn: cos and sin of the positions, each (n_batch or 1, 1, head_dim), or None.
    mask: (n_batch or 1, n_heads or 1, 1, n_past + 1) bool, True where a key is seen; None sees all.
    """

    x: Tensor
    turn: tuple[Tensor, Tensor] | None
    mask: Tensor | None


class Decoder:
    """The layers and norms of a decoder layer, checked once; it holds them.

    Args:
        layers: queries, keys, values, output, gate, up and down.
        norms: of the input, before the MLP, and of single heads of queries and of keys, or None for these two.
        sizes: of the heads.
        dtype: of inputs, results, weights of norms and the cache.
        turns: whether queries and keys are turned by their positions.
        isa: an instruction set that this CPU has; the fastest, or the one of VLMQ_CPU_ISA, unless told.

    Raises:
        ValueError: sizes that do not fit each other, or a norm that is not contiguous in `dtype`.
    """

    def __init__(
        self,
        layers: Sequence[BoundLayer],
        norms: Sequence[Norm | None],
        sizes: Sizes,
        dtype: torch.dtype,
        *,
        turns: bool = True,
        isa: str | None = None,
    ) -> None:
        if (reason := why_not(layers, norms, sizes, dtype)) is not None:
            raise ValueError(reason)
        self.held = tuple(layers), tuple(norms)
        self.dtype = dtype
        self.sizes = sizes
        self.turns = turns
        self.hidden = layers[0].plan.in_features
        self.kind = self.hidden, sizes.n_heads, sizes.head_dim, dtype
        self.past_kind = sizes.n_kv_heads, sizes.head_dim, dtype
        self.library = layers[0].plan.library
        record = DecoderRecord(
            scale=sizes.scale,
            hidden=self.hidden,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            head_dim=sizes.head_dim,
            intermediate=layers[-1].plan.in_features,
            dtype=DTYPES[dtype],
            isa=isa_index(isa),
            turns=turns,
        )
        record.layers[:] = [layer.address for layer in layers]
        record.norms[:] = [None if norm is None else norm.weight.data_ptr() for norm in norms]
        record.eps[:] = [0.0 if norm is None else norm.eps for norm in norms]
        self.record = record
        self.address = ctypes.addressof(record)

    def takes(self, token: Token, past: Past) -> bool:
        """Say whether `decode` computes this layer."""
        (x, turn, mask), (n_heads, _, head_dim, _) = token, self.sizes
        n_batch, dtype = x.shape[0], self.dtype
        return (
            x.shape == (n_batch, 1, self.hidden)
            and 0 < n_batch <= MAX_TOKENS
            and x.dtype == dtype
            and x.is_cpu
            and x.is_contiguous()
            and (turn is None or turn[0].shape == turn[1].shape)
            and all(_is_turn(t, n_batch, head_dim, dtype) for t in turn or ())
            and (mask is None or is_plain_mask(mask, n_batch, n_heads, past.n_tokens + 1))
            and self.fits(token, past)
        )

    def fits(self, token: Token, past: Past) -> bool:
        """Say whether these are its keys and values, for a token that a layer of the same `kind` takes."""
        kind = (len(token.x), *self.past_kind)
        return (
            past.kinds == (kind, kind)
            and 0 <= past.n_tokens < past.n_room
            and (token.turn is not None or not self.turns)
        )


def decode(layers: Sequence[tuple[Decoder, Past]], token: Token) -> tuple[Tensor, ...]:
    """Compute one new token of each sequence through layers, one after the other.

    Only for a token that the first takes; others must be of its kind, fit, and hold as many tokens. Keys and values of
    the new one are written behind them.

    Returns:
        What each layer gives, (n_batch, 1, hidden).
    """
    (x, turn, mask), n, (first, past) = token, len(layers), layers[0]
    outs = x.new_empty((n, *x.shape))
    cos, sin = turn or (None, None)
    masked = (0, 0) if mask is None else [mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 1)]
    record = TokenRecord(
        x.data_ptr(),
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        None if mask is None else mask.data_ptr(),
        x.shape[0],
        past.n_tokens,
        cos.stride(0) if cos is not None and cos.shape[0] > 1 else 0,
        *masked,
    )
    places = ctypes.c_void_p * n
    decoders = places(*[decoder.address for decoder, _ in layers])
    pasts = places(*[ctypes.addressof(past.record) for _, past in layers])
    args = decoders, pasts, n, ctypes.byref(record), outs.data_ptr(), torch.get_num_threads()
    if first.library.vlmq_decode(*args):
        raise MemoryError(f"no memory for a decoder layer over {past.n_tokens + 1} keys")
    return outs.unbind(0)


def _kind_of(t: Tensor) -> tuple[int, int, int, torch.dtype] | None:
    """Sequences, heads and numbers in each, dtype; None if the kernels do not read it."""
    if t.dim() != 4 or t.stride(-1) != 1 or not t.is_cpu:
        return None
    n_batch, n_heads, _, head_dim = t.shape
    return n_batch, n_heads, head_dim, t.dtype


def _is_turn(turn: Tensor, n_batch: int, head_dim: int, dtype: torch.dtype) -> bool:
    n, *rest = turn.shape
    return (
        n in (1, n_batch)
        and rest == [1, head_dim]
        and turn.dtype == dtype
        and turn.is_contiguous()
        and turn.is_cpu
    )


def why_not(
    layers: Sequence[BoundLayer], norms: Sequence[Norm | None], sizes: Sizes, dtype: torch.dtype
) -> str | None:
    """Say why these make no `Decoder`; None if they do."""
    n_heads, n_kv_heads, head_dim, _ = sizes
    if dtype not in DTYPES or len(layers) != N_LAYERS or head_dim < 1 or head_dim % MULTIPLE:
        return (
            f"a decoder layer is {N_LAYERS} layers in float32, bfloat16 or float16 and heads of a multiple of "
            f"{MULTIPLE}, got {len(layers)} layers in {dtype} and heads of {head_dim}"
        )
    hidden, inner = layers[0].plan.in_features, layers[-1].plan.in_features
    queries, keys = n_heads * head_dim, n_kv_heads * head_dim
    expected = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    expected += [(hidden, inner), (hidden, inner), (inner, hidden)]
    shapes = [(layer.plan.in_features, layer.out_features) for layer in layers]
    widths = [None if norm is None else tuple(norm.weight.shape) for norm in norms]
    offered = [{(hidden,)}, {(hidden,)}, {(head_dim,), None}, {(head_dim,), None}]
    fits = all(width in some for width, some in zip(widths, offered, strict=True))
    if shapes != expected or not fits or n_kv_heads < 1 or n_heads % n_kv_heads:
        return f"sizes do not fit each other: layers {shapes}, norms {widths}, heads {sizes}"
    weights = [norm.weight for norm in norms if norm is not None]
    if any(w.dtype != dtype or not w.is_contiguous() or not w.is_cpu for w in weights):
        return f"weights of norms must be contiguous {dtype} on the CPU"
    return None
