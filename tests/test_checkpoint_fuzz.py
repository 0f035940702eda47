"""A damaged checkpoint gives the same logits or a clear error, never noise."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import logits, packed
from transformers import AutoModelForCausalLM

from vlmq.checkpoint import load, save

WIDTH = {"F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "F32": 4, "I32": 4, "F8_E4M3": 1}
BLOCK_KEYS = ("modules", "checksums", "format_version")
CLEAR = (ValueError, RuntimeError, OSError)
Header = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model = packed("llama")
    return save(model, tmp_path_factory.mktemp("fuzz") / "model", max_shard_size="30KB"), logits(
        model, "llama"
    )


def check(original: tuple[Path, torch.Tensor], damage: Callable[[Path], None]) -> None:
    folder, expected = original
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
        damage(copy)
        for read in (load, AutoModelForCausalLM.from_pretrained):
            try:
                model = read(copy)
            except CLEAR:
                continue
            assert torch.equal(logits(model, "llama"), expected)


def shard(folder: Path, index: int) -> Path:
    paths = sorted(folder.glob("*.safetensors"))
    return paths[index % len(paths)]


def edit_header(path: Path, change: Callable[[Header], Any]) -> None:
    """Change the header of a file and leave its data as they are."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def tensors_of(header: Header) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


fuzz = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
index = st.integers(0, 10**6)


@fuzz
@given(which=index, at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), in_header=st.booleans())
def test_flipped_byte(original, which, at, mask, in_header):
    def damage(folder: Path) -> None:
        path = shard(folder, which)
        data = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
        data[int(at * end)] ^= mask
        path.write_bytes(data)

    check(original, damage)


@fuzz
@given(which=index, at=st.floats(0, 1, exclude_max=True), extra=st.binary(max_size=9))
def test_truncated_or_prolonged_file(original, which, at, extra):
    def damage(folder: Path) -> None:
        path = shard(folder, which)
        data = path.read_bytes()
        path.write_bytes(data + extra if extra else data[: int(at * len(data))])

    check(original, damage)


@fuzz
@given(
    which=index,
    tensor=index,
    dtype=st.sampled_from(["F16", "BF16", "I16", "U8", "I8", "F32", "I32", "F8_E4M3"]),
)
def test_other_dtype_in_the_header(original, which, tensor, dtype):
    def change(header: Header) -> None:
        names = tensors_of(header)
        entry = header[names[tensor % len(names)]]
        ratio = WIDTH[entry["dtype"]] / WIDTH[dtype]
        entry["dtype"] = dtype
        # Keep the number of bytes right, so that the file itself stays valid.
        if entry["shape"]:
            entry["shape"][-1] = int(entry["shape"][-1] * ratio)

    check(original, lambda folder: edit_header(shard(folder, which), change))


@fuzz
@given(which=index, tensor=index, how=st.sampled_from(["turn", "flatten", "unsqueeze"]))
def test_other_shape_in_the_header(original, which, tensor, how):
    def change(header: Header) -> None:
        names = tensors_of(header)
        entry = header[names[tensor % len(names)]]
        shape = entry["shape"]
        n = 1
        for size in shape:
            n *= size
        entry["shape"] = {"turn": shape[::-1], "flatten": [n], "unsqueeze": [1, *shape]}[how]

    check(original, lambda folder: edit_header(shard(folder, which), change))


@fuzz
@given(which=index, first=index, second=index, name=st.text(max_size=5))
def test_renamed_or_swapped_tensors(original, which, first, second, name):
    def change(header: Header) -> None:
        names = tensors_of(header)
        a, b = names[first % len(names)], names[second % len(names)]
        if name:
            header[a + name] = header.pop(a)
        else:
            header[a], header[b] = header[b], header[a]

    check(original, lambda folder: edit_header(shard(folder, which), change))


@fuzz
@given(which=index, other=index, is_dropped=st.booleans())
def test_dropped_or_mixed_shards(original, which, other, is_dropped):
    def damage(folder: Path) -> None:
        path = shard(folder, which)
        if is_dropped:
            path.unlink()
        else:
            path.write_bytes(shard(folder, other).read_bytes())

    check(original, damage)


@fuzz
@given(key=st.sampled_from(BLOCK_KEYS), at=st.floats(0, 1), to=st.characters())
def test_changed_character_in_the_config_block(original, key, at, to):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        block = config["quantization_config"]
        text = json.dumps(block[key])
        place = int(at * (len(text) - 1))
        changed = text[:place] + to + text[place + 1 :]
        block[key] = "@"
        (folder / "config.json").write_text(json.dumps(config).replace('"@"', changed))

    check(original, damage)
