"""What the tensors of a packed checkpoint must satisfy: structure, dtypes, values and checksums.

Loading a checkpoint in transformers only logs a missing tensor, keeps a wrong integer dtype and drops what
it does not know; each of these would be a model that answers with noise. So these are checked, and none of
the checks needs to know how a family names its tensors on disk:

- `read_headers`, before anything is allocated: every file is a whole safetensors file, and the packed tensors
  in them are not more than the config says.
- `check_missing`, `check_layer_tensor`, after loading: nothing is missing; each packed tensor has its dtype
  and shape, finite scales, and no code beyond the format's levels.
- `check_sums`, computed when saving and after loading, over the bytes in memory (one pass, a few GB a
  second): one CRC-32 per packed layer, which also covers its scheme, so a config that calls ternary codes
  int2 is found; one for all other tensors. They lie in config.json: metadata of the safetensors files would
  make their bytes depend on the order of a hash table. They find damage, not malice: who can rewrite a file
  can rewrite its sums.
"""

import re
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from vlmq.formats import Format, n_groups
from vlmq.guard import find_guards
from vlmq.kernels.packing import row_bytes
from vlmq.linear import QuantLinear
from vlmq.scheme import Scheme

PACKED = ("qweight", "scales", "zeros")
AGAIN = "download the checkpoint again or save it again with vlmq"


def listing(names: Sequence[str], limit: int = 5) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_headers(files: Sequence[str | Path], has_zeros: Sequence[bool]) -> None:
    """Check the headers of a checkpoint's files.

    Args:
        files: every safetensors file of the checkpoint.
        has_zeros: for each packed layer that the config lists, whether its format stores zero points.

    Raises:
        ValueError: a file is not safetensors, is truncated or damaged, or there are packed tensors that the
            config does not know.
    """
    found = Counter(name for path in files for name in read_header(path))
    for name in find_guards([str(path) for path in files]):
        del found[name]
    _check_structure(found, has_zeros, str(Path(files[0]).parent))


def read_header(path: str | Path) -> list[str]:
    """Return the tensor names of one safetensors file.

    Raises:
        ValueError: the file is not safetensors, truncated or damaged.
    """
    if not str(path).endswith(".safetensors"):
        raise ValueError(f"{path}: a vlmq checkpoint is safetensors only, pickled weights are never read")
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {AGAIN}") from error


def _check_structure(found: Counter[str], has_zeros: Sequence[bool], folder: str) -> None:
    twice = sorted(name for name, count in found.items() if count > 1)
    if twice:
        raise ValueError(f"{folder}: tensors that are in two files: {listing(twice)}; {AGAIN}")
    layers = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    known = (*PACKED, "bias")
    stray = sorted(
        name for name in found if name.rpartition(".")[0] in layers and name.rpartition(".")[2] not in known
    )
    if stray:
        raise ValueError(
            f"{folder}: quantized layers hold tensors that no format has: {listing(stray)}; {AGAIN}"
        )
    for leaf, expected in (
        ("qweight", len(has_zeros)),
        ("scales", len(has_zeros)),
        ("zeros", sum(has_zeros)),
    ):
        names = sorted(name for name in found if name.endswith(f".{leaf}"))
        # Fewer is found by name after loading; more would be dropped without a word.
        if len(names) > expected:
            raise ValueError(
                f"{folder}: config.json asks for {expected} tensors '{leaf}', the files hold {len(names)}, "
                f"such as {names[-1]}; {AGAIN}"
            )


def check_layer_tensor(name: str, leaf: str, tensor: Tensor, layer: QuantLinear) -> None:
    """Check one packed tensor of a layer against the layer's shape and format.

    Args:
        name: name of the tensor, for the message.
        leaf: "qweight", "scales" or "zeros"; anything else passes.
        tensor: its value, on any device.
        layer: the layer it belongs to.

    Raises:
        ValueError: wrong dtype or shape, a scale that is not finite, a code beyond the format's levels.
    """
    groups = (layer.out_features, n_groups(layer.in_features, layer.group_size))
    expected = {
        "qweight": (torch.uint8, (layer.out_features, row_bytes(layer.in_features, layer.format.bits))),
        "scales": (torch.float16, (*groups, layer.format.n_terms)),
        "zeros": (torch.uint8, groups),
    }
    if leaf not in expected:
        return
    dtype, shape = expected[leaf]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"tensor {name!r}: expected {shape} {dtype}, the checkpoint holds {got}; {AGAIN}")
    if leaf == "scales" and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"tensor {name!r} holds scales that are not finite; quantize the layer again")
    if leaf == "qweight":
        _check_codes(name, tensor, layer.format)


def _check_codes(name: str, qweight: Tensor, fmt: Format) -> None:
    """Find codes beyond the levels; by a count of byte values, as a packed code never straddles two bytes."""
    if fmt.n_levels == 2**fmt.bits:
        return
    counts = torch.bincount(qweight.reshape(-1), minlength=256).cpu()
    values = torch.arange(256)
    codes = torch.stack([(values >> shift) & (2**fmt.bits - 1) for shift in range(0, 8, fmt.bits)])
    bad = (codes >= fmt.n_levels).any(0) & (counts > 0)
    if bool(bad.any()):
        worst = int(codes[:, bad].max())
        raise ValueError(
            f"tensor {name!r} holds code {worst}, {fmt.name} has codes 0 to {fmt.n_levels - 1}; {AGAIN}"
        )


def check_listed(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Check that the model's packed layers are those listed, each with its scheme.

    Raises:
        ValueError: a packed layer is not listed, a listed one is not packed, or it has another scheme.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    odd = sorted(layers.keys() ^ schemes.keys())
    if odd:
        raise ValueError(
            f"the model's packed layers and those listed differ: {listing(odd)}; list each packed layer, "
            "by its name in model.named_modules(), with its scheme"
        )
    for name, scheme in schemes.items():
        layer = layers[name]
        if (layer.format, layer.group_size) != (scheme.format, scheme.group_size):
            found = Scheme(layer.format, layer.group_size).name
            raise ValueError(f"layer {name!r} is packed as {found}, listed as {scheme.name}")


def check_missing(model: PreTrainedModel, packed: Container[str]) -> None:
    """Check that every tensor of a model that was just loaded came from a file.

    transformers leaves a missing packed tensor as it was allocated and draws a missing weight anew. A
    weight may be missing only from another class than the one that was saved, which may add a head.

    Raises:
        ValueError: tensors are missing; the message names them.
    """
    is_saved_class = type(model).__name__ in (model.config.architectures or [])
    may_miss = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        # An offloaded tensor carries no flag; one that was never read has a wrong checksum.
        if tensor.is_meta or getattr(tensor, "_is_hf_initialized", False):
            continue
        if name.rpartition(".")[0] in packed or (
            is_saved_class and not any(pattern.search(name) for pattern in may_miss)
        ):
            missing.append(name)
    if missing:
        raise ValueError(
            f"the checkpoint lacks tensors of {type(model).__name__}: {listing(missing)}; {AGAIN}"
        )


def offloaded_value(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """The value of a tensor of the model; of an offloaded one, from where it lies."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def packed_tensors(model: PreTrainedModel, layer: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of one packed layer: name within the layer, value."""
    for leaf in PACKED:
        tensor = getattr(model.get_submodule(layer), leaf, None)
        if tensor is not None:
            yield leaf, offloaded_value(model, f"{layer}.{leaf}", tensor)


def _other_tensors(model: PreTrainedModel, packed: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds beside the packed tensors, sorted by name; a tied weight once."""
    absent = {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}
    may_miss = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        owner, _, leaf = name.rpartition(".")
        is_packed = owner in packed and leaf in PACKED
        if not is_packed and name not in absent and not any(p.search(name) for p in may_miss):
            yield name, tensor


def checksum(tensors: Iterable[tuple[str, Tensor]], scheme: str = "") -> str:
    """Return the CRC-32 of the scheme's name, then of names, dtypes, shapes and bytes, as eight hex digits.

    Args:
        tensors: names and values of any shape, dtype and device, in a fixed order.
        scheme: the layer's scheme, "" for what is not packed.
    """
    crc = zlib.crc32(scheme.encode())
    for name, tensor in tensors:
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        data = tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
        crc = zlib.crc32(data.numpy().data, crc)
    return f"{crc:08x}"


def checksums(
    model: PreTrainedModel, modules: Mapping[str, Sequence[str]], unchecked: Container[str] | None = None
) -> dict[str, Any]:
    """Return what the config keeps to know the tensors again.

    Args:
        model: a packed model.
        modules: {scheme: names of its layers}.
        unchecked: tensors to leave out; None leaves out those of another floating dtype than the model's, as
            a load casts them.

    Returns:
        "layers": {scheme: [sum of each of its layers]}, "others": sum of all other tensors, "unchecked": the
        names left out, "dtype": the model's dtype.
    """
    packed = {name for names in modules.values() for name in names}
    others = dict(_other_tensors(model, packed))
    if unchecked is None:
        unchecked = [n for n, t in others.items() if t.is_floating_point() and t.dtype != model.dtype]
    layers = {
        scheme: [checksum(packed_tensors(model, name), scheme) for name in names]
        for scheme, names in modules.items()
    }
    rest = checksum((n, offloaded_value(model, n, t)) for n, t in others.items() if n not in unchecked)
    return {"dtype": str(model.dtype), "layers": layers, "others": rest, "unchecked": unchecked}


def check_sums(
    model: PreTrainedModel,
    modules: Mapping[str, Sequence[str]],
    saved: Mapping[str, Any] | None,
    dtype: str | None,
) -> None:
    """Compare a loaded model with the checksums that were saved.

    Args:
        model: the loaded model.
        modules: {scheme: names of its layers}.
        saved: what `checksums` gave for the model that was saved.
        dtype: the dtype that the model was loaded in. Weights that were cast cannot be compared.

    Raises:
        ValueError: there are no checksums, or they differ.
    """
    keys = {"dtype", "layers", "others", "unchecked"}
    if not isinstance(saved, Mapping) or saved.keys() != keys or not isinstance(saved["layers"], Mapping):
        raise ValueError(f"quantization_config of {model.config.name_or_path} has no checksums: {AGAIN}")
    found = checksums(model, modules, saved["unchecked"])
    for scheme, names in modules.items():
        sums = saved["layers"].get(scheme, [])
        damaged = [n for n, a, b in zip_longest(names, found["layers"][scheme], sums) if a != b]
        if damaged:
            raise ValueError(f"packed tensors are not as they were saved: {listing(damaged)}; {AGAIN}")
    is_saved_class = type(model).__name__ in (model.config.architectures or [])
    if is_saved_class and dtype == saved["dtype"] and found["others"] != saved["others"]:
        raise ValueError(f"full-precision tensors are not as they were saved; {AGAIN}")
