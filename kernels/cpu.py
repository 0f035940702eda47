"""The packed linear layer on a CPU, in C (csrc/).

Codes are multiplied as bytes with activations rounded to 8 bits, one scale for each block of 128 inputs
(x ~ s c, c in -127 .. 127, s = max|x| / 127):

    y[n, o] = sum_blocks s[n, block] sum_groups scale[o, g] (sum_i L[q[o, i]] c[n, i] - z[o, g] sum_i c[n, i])

with integer sums in the inner parentheses. Up to `MAX_TOKENS` tokens, as in decoding, go this way; few of them meet
codes as they are stored (csrc/kernel.h), of more, tiles of rows are unpacked to bytes, once, and meet all tokens
(csrc/panels.h).

More tokens, a prompt, are not rounded: W is unpacked in C, `CHUNK_WEIGHTS` weights at a time, to what the reference
unpacks, and multiplied by torch. The peak beside arguments and result is one chunk in the dtype of x (float32 for
float16, whose product and W stay in float32 here). Where that is asked for (`rounds_prompts`), prompts of bfloat16 and
float16 go the first way too, as long as it is the faster one (`most_tokens` in csrc/vlmq_cpu.c); the peak is then x in
8 bits, and for each thread the results of a tile.

Neither the number of threads nor the tokens beside it change a bit of a token's result, except that it is computed in
one of the three ways. Inputs in float64 and a bias in it are left to the reference.
"""

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from vlmq.formats import Format, get_format
from vlmq.kernels.library import FormatRecord, LayerRecord, choose_isa, isa_names, open_library
from vlmq.kernels.parts import check_parts

MAX_TOKENS = 16
MAX_LAYERS = 8
CHUNK_WEIGHTS = 2**20
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Plan:
    """What the C library prepares once for a format, a width of rows, a group size and an instruction set.

    `address` is its place in memory; it is freed with this object.
    """

    def __init__(
        self, library: ctypes.CDLL, fmt: Format, in_features: int, group_size: int, isa: str
    ) -> None:
        record = format_record(fmt)
        index = isa_names(library).index(isa)
        address = library.vlmq_plan_create(ctypes.byref(record), in_features, group_size, index)
        if not address:
            raise RuntimeError(
                f"no CPU plan for {fmt.name}, {in_features} inputs, group size {group_size}, {isa}"
            )
        self.address: int = address
        self.most_tokens: int = library.vlmq_most_tokens(address)
        self.in_features = in_features
        self.library = library
        weakref.finalize(self, library.vlmq_plan_free, address)


def why_not(x: Tensor, format_name: str, in_features: int, group_size: int) -> str | None:
    """Say why the C kernels cannot run on this input; None if they can."""
    if x.device.type != "cpu":
        return f"runs on a CPU, not on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"computes in float32, bfloat16 and float16, not in {x.dtype}"
    return missing_library()


def missing_library() -> str | None:
    """Say why there is no C library; None if there is one."""
    library = open_library()
    return library if isinstance(library, str) else None


def isa_in_use() -> str:
    """Name of the instruction set that a layer bound now would use.

    Raises:
        ValueError: VLMQ_CPU_ISA names one that this CPU does not have, or there is no library.
    """
    library = open_library()
    if isinstance(library, str):
        raise ValueError(f"the CPU kernels cannot run: {library}")
    return choose_isa(library)


def quant_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    *,
    rounds_prompts: bool = False,
) -> Tensor:
    """Apply the packed linear layer; as `vlmq.kernels.reference.quant_linear`, but for the rounding of x (`bind`).

    Raises:
        ValueError: a tensor whose shape, dtype or device does not fit the others.
    """
    parts = (qweight, scales, zeros, bias)
    return bind(*parts, format_name, in_features, group_size, rounds_prompts=rounds_prompts)(x)


def bind(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    format_name: str,
    in_features: int,
    group_size: int,
    *,
    isa: str | None = None,
    rounds_prompts: bool = False,
) -> "BoundLayer":
    """Check the tensors of a layer once, and return the layer as a function of x alone.

    Args:
        isa: an instruction set that this CPU has; the fastest, or the one of VLMQ_CPU_ISA, unless told.
        rounds_prompts: whether more than MAX_TOKENS tokens of bfloat16 and float16 may be rounded to 8 bits.

    Raises:
        ValueError: a tensor whose shape, dtype or device does not fit the others.
    """
    library = open_library()
    if isinstance(library, str):
        raise ValueError(f"the CPU kernels cannot run: {library}")
    fmt = get_format(format_name)
    check_parts(qweight, scales, zeros, bias, fmt, in_features, group_size, torch.device("cpu"))
    plan = _plan(fmt.name, in_features, group_size, choose_isa(library, isa))
    return BoundLayer(plan, qweight, scales, zeros, bias, rounds_prompts)


class BoundLayer:
    """A layer whose tensors were checked, as a function of x. It holds them until `let_go`."""

    def __init__(
        self,
        plan: Plan,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        rounds_prompts: bool = False,
    ) -> None:
        self.plan = plan
        self.most_rounded = plan.most_tokens if rounds_prompts else MAX_TOKENS
        self.held: tuple[Tensor | None, ...] = (qweight, scales, zeros, bias)
        self.seen = [None if part is None else (part.data_ptr(), part.nbytes) for part in self.held]
        # What is not contiguous is copied, and the copy stays.
        parts = [None if part is None else part.detach().contiguous() for part in self.held]
        self.copies = [
            p for p, own in zip(parts, self.held, strict=True) if p is not None and not _is_same(p, own)
        ]
        self.bias = parts[3]
        self.out_features = qweight.shape[0]
        addresses = [None if part is None else part.data_ptr() for part in parts]
        bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        self.record = LayerRecord(plan.address, *addresses, self.out_features, bias_dtype)
        self.address = ctypes.addressof(self.record)
        self.addresses = (ctypes.c_void_p * 1)(self.address)

    def let_go(self) -> None:
        """Hold the tensors no longer: the caller has them, and asks `takes` before each call."""
        self.held = ()

    def takes(self, x: Tensor, parts: tuple[Tensor | None, ...]) -> bool:
        """Say whether the kernels can run on x, and the parts are where the bound tensors were."""
        if not x.is_cpu or x.dtype not in DTYPES:
            return False
        for part, seen in zip(parts, self.seen):  # noqa: B905  asked at each call, and both are of four
            if part is None or seen is None:
                if part is not seen:
                    return False
            elif part.data_ptr() != seen[0] or part.nbytes != seen[1]:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in_features) on the CPU; the result (..., out_features) has its dtype.

        Raises:
            ValueError: a wrong shape, dtype or device.
        """
        plan, dtype = self.plan, DTYPES.get(x.dtype)
        shape = x.shape
        if dtype is None or not x.is_cpu or not shape or shape[-1] != plan.in_features:
            raise ValueError(
                f"x must be (..., {plan.in_features}) in float32, bfloat16 or float16 on the CPU, "
                f"got {tuple(shape)} {x.dtype} on {x.device}"
            )
        if not self.rounds(x):
            return self._apply_unpacked(x)
        return _multiply(plan, self.addresses, (self.out_features,), x, dtype)[0]

    def join(self, others: Sequence[object]) -> "JoinedLayers | None":
        """Return this layer and others as one function of x; None if they have not one plan or are too many."""
        layers = [
            self,
            *(other for other in others if isinstance(other, BoundLayer) and other.plan is self.plan),
        ]
        return JoinedLayers(layers) if len(others) < len(layers) <= MAX_LAYERS else None

    def rounds(self, x: Tensor) -> bool:
        """Say whether the activations x (..., in_features) are rounded to 8 bits."""
        n_tokens = x.numel() // self.plan.in_features
        return n_tokens <= MAX_TOKENS or (n_tokens <= self.most_rounded and x.dtype != torch.float32)

    def _apply_unpacked(self, x: Tensor) -> Tensor:
        """Multiply x with W, unpacked chunk by chunk."""
        wide = x.float() if x.dtype == torch.float16 else x
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        n_rows = max(1, CHUNK_WEIGHTS // self.plan.in_features)
        out = x.new_empty((*x.shape[:-1], self.out_features))
        with torch.autocast("cpu", enabled=False):
            for start in range(0, self.out_features, n_rows):
                rows = slice(start, min(start + n_rows, self.out_features))
                part = None if bias is None else bias[rows]
                out[..., rows] = functional.linear(wide, self.unpack(rows, wide.dtype), part)
        return out

    def unpack(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of W, (n_rows, in_features) in `dtype`, float32 or bfloat16; bounds are not checked."""
        return self._unpack(None, rows.start, rows.stop - rows.start, dtype)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the listed rows of W, (n_ids, in_features) in `dtype`; float16 is rounded from float32.

        Args:
            ids: (n_ids,) int64 on the CPU.
            dtype: float32, bfloat16 or float16.

        Raises:
            IndexError: a row that does not exist.
        """
        ids = ids.contiguous()
        wide = torch.float32 if dtype == torch.float16 else dtype
        return self._unpack(ids.data_ptr(), 0, ids.numel(), wide).to(dtype)

    def _unpack(self, ids: int | None, first: int, n_rows: int, dtype: torch.dtype) -> Tensor:
        weight = torch.empty(n_rows, self.plan.in_features, dtype=dtype)
        args = (self.address, ids, first, n_rows, weight.data_ptr(), DTYPES[dtype], torch.get_num_threads())
        status = self.plan.library.vlmq_unpack(*args)
        if status == -2:
            raise IndexError(f"ids must be 0 .. {self.out_features - 1}")
        if status:
            raise MemoryError(f"no memory to unpack {n_rows} rows of {self.plan.in_features} inputs")
        return weight


class JoinedLayers:
    """Layers of one plan as one function of x: it is prepared once, and the threads are woken once."""

    def __init__(self, layers: Sequence[BoundLayer]) -> None:
        self.layers = tuple(layers)
        self.plan = layers[0].plan
        self.addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
        self.widths = tuple(layer.out_features for layer in layers)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Apply each layer to an x that it takes.

        Raises:
            ValueError: as a call of the first layer alone.
        """
        plan = self.plan
        if not x.shape or x.shape[-1] != plan.in_features or not self.layers[0].rounds(x):
            return [layer(x) for layer in self.layers]
        return _multiply(plan, self.addresses, self.widths, x, DTYPES[x.dtype])


def _multiply(
    plan: Plan, addresses: "ctypes.Array[ctypes.c_void_p]", widths: tuple[int, ...], x: Tensor, dtype: int
) -> list[Tensor]:
    """Multiply the layers at these addresses, as many rows each as `widths` says, with few tokens."""
    x, sizes = x.contiguous(), x.shape[:-1]
    outs = [x.new_empty((*sizes, width)) for width in widths]
    places = (ctypes.c_void_p * len(outs))(*[out.data_ptr() for out in outs])
    n_tokens, n_threads = x.numel() // plan.in_features, torch.get_num_threads()
    if plan.library.vlmq_linear(addresses, places, len(outs), x.data_ptr(), n_tokens, dtype, n_threads):
        raise MemoryError(f"no memory for {n_tokens} tokens of {plan.in_features} inputs")
    return outs


def format_record(fmt: Format) -> FormatRecord:
    """Describe the levels of a format to the C library: first + step * table[term][code].

    Raises:
        ValueError: levels that are not evenly spaced from one first level, which the kernels cannot compute.
    """
    terms = [[level[t] for level in fmt.levels] for t in range(fmt.n_terms)]
    first = terms[0][0]
    step = min(abs(b - a) for values in terms for a in values for b in values if a != b)
    steps = [[(value - first) / step for value in values] for values in terms]
    is_line = fmt.n_terms > 1 or steps[0] == list(range(fmt.n_levels))
    if not is_line or any(n != int(n) or n < 0 for values in steps for n in values):
        raise ValueError(f"levels of format {fmt.name} are not evenly spaced: {fmt.levels}")
    record = FormatRecord(fmt.bits, fmt.n_terms, fmt.has_zero, first, step, fmt.zero_step)
    if fmt.n_terms > 1:
        for t, values in enumerate(steps):
            record.table[t][: len(values)] = [int(n) for n in values]
    return record


def _is_same(copy: Tensor, own: Tensor | None) -> bool:
    return own is not None and copy.data_ptr() == own.data_ptr()


@cache
def _plan(format_name: str, in_features: int, group_size: int, isa: str) -> Plan:
    library = open_library()
    assert not isinstance(library, str)
    return Plan(library, get_format(format_name), in_features, group_size, isa)
