"""The C kernels touch only what they are given: guard pages, sizes that do not fit, no compiler."""

import ctypes
import mmap
import warnings

import pytest
import torch
from cpu_cases import ISAS, LIBRARY, multiply, needs_library, random_layer, takes_prompts
from random_weights import random_weight

from vlmq.formats import FORMATS
from vlmq.kernels import backends, cpu, library
from vlmq.kernels.packing import pack

PAGE = mmap.PAGESIZE


class Guarded:
    """Tensors that end where their memory does: the page after each may not be touched."""

    def __init__(self):
        self.maps = []

    def copy(self, tensor):
        n_bytes = tensor.numel() * tensor.element_size()
        n_pages = -(-n_bytes // PAGE)
        pages = mmap.mmap(-1, (n_pages + 1) * PAGE)
        self.maps.append(pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + n_pages * PAGE), PAGE, 0) == 0
        flat = torch.frombuffer(pages, dtype=torch.uint8, count=n_bytes, offset=n_pages * PAGE - n_bytes)
        out = flat.view(tensor.dtype).view(tensor.shape)
        return out.copy_(tensor)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name", ["int8", "int4", "int3", "int2-sym", "ternary", "binary", "ternary2", "binary2"]
)
def test_nothing_beyond_the_tensors_is_read(name, isa):
    guarded = Guarded()
    for out_features, in_features, group_size in (
        (5, 130, 16),
        (9, 200, 64),
        (4, 384, 128),
        (3, 1, 16),
        (6, 63, 0),
    ):
        weight = random_weight(name, out_features, in_features, group_size or None)
        parts = (pack(weight.codes, weight.format.bits), weight.scales, weight.zeros)
        parts = [None if part is None else guarded.copy(part) for part in parts]
        bias = guarded.copy(torch.randn(out_features))
        layer = cpu.bind(*parts, bias, name, in_features, group_size, isa=isa)
        for n_tokens in (1, 6, 20 if takes_prompts(layer) else 16):
            x = guarded.copy(torch.randn(n_tokens, in_features))
            y = guarded.copy(torch.full((n_tokens, out_features), torch.nan))
            out = (ctypes.c_void_p * 1)(y.data_ptr())
            args = (layer.addresses, out, 1, x.data_ptr(), n_tokens, 0, 1)
            assert layer.plan.library.vlmq_linear(*args) == 0
            assert torch.equal(y, multiply(layer, x))
        out = guarded.copy(torch.empty(out_features, in_features))
        assert layer.plan.library.vlmq_unpack(layer.address, None, 0, out_features, out.data_ptr(), 0, 1) == 0
        assert torch.equal(out, weight.dequantize())


def arguments(name="int4", out_features=6, in_features=200, group_size=64):
    weight = random_weight(name, out_features, in_features, group_size)
    bias = torch.randn(out_features)
    return [
        pack(weight.codes, weight.format.bits), weight.scales, weight.zeros, bias, name, in_features, group_size,
    ]  # fmt: skip


@needs_library
@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda t: t[:, :-1], r"qweight of a int4 layer .* must be \(6, 100\)"),
        (0, lambda t: t[:5], r"scales of a int4 layer .* must be \(5, 4, 1\)"),
        (0, lambda t: t.short(), r"qweight .* torch.int16"),
        (0, lambda t: t.to("meta"), r"qweight .* on meta"),
        (1, lambda t: t[:, :3], r"scales .* must be \(6, 4, 1\) torch.float16 on the CPU, got \(6, 3, 1\)"),
        (1, lambda t: t.float(), r"scales .* got \(6, 4, 1\) torch.float32"),
        (2, lambda t: t[:, :1], r"zeros .* must be \(6, 4\)"),
        (2, lambda t: None, r"zeros .* got None"),
        (3, lambda t: t[:2], r"bias .* must be \(6,\)"),
        (3, lambda t: t.double(), r"bias .* torch.float64"),
        (5, lambda n: 201, r"qweight .* must be \(6, 102\)"),
        (6, lambda n: 32, r"scales .* must be \(6, 7, 1\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(at, change, message):
    args = arguments()
    args[at] = change(args[at])
    with pytest.raises(ValueError, match=message):
        cpu.bind(*args)


@needs_library
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 199),
        torch.tensor(1.0),
        torch.randn(2, 200).double(),
        torch.empty(2, 200, device="meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x):
    with pytest.raises(
        ValueError, match=r"x must be \(\.\.\., 200\) in float32, bfloat16 or float16 on the CPU"
    ):
        random_layer("int4", 6, 200, 64)(x)


@needs_library
def test_unknown_instruction_set_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"'mmx' .* does not run here; .*portable do"):
        cpu.bind(*arguments(), isa="mmx")
    monkeypatch.setenv("VLMQ_CPU_ISA", "sse")
    with pytest.raises(ValueError, match=r"'sse' \(VLMQ_CPU_ISA\)"):
        cpu.bind(*arguments())


@needs_library
def test_environment_forces_an_instruction_set(monkeypatch):
    monkeypatch.setenv("VLMQ_CPU_ISA", "portable")
    assert library.choose_isa(LIBRARY) == "portable"
    monkeypatch.delenv("VLMQ_CPU_ISA")
    assert library.choose_isa(LIBRARY) == ISAS[0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_described_by_its_levels(name):
    fmt = FORMATS[name]
    record = cpu.format_record(fmt)
    for code, levels in enumerate(fmt.levels):
        for t, level in enumerate(levels):
            n = code if fmt.n_terms == 1 else record.table[t][code]
            assert record.first + record.step * n == level


def test_without_the_library_the_reference_runs_and_one_warning_says_what_is_lost(monkeypatch, tmp_path):
    said = library.open_library(tmp_path / "nothing.so")
    monkeypatch.setattr(cpu, "open_library", lambda: said)
    monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    backends._warn_once.cache_clear()
    x = torch.randn(2, 200)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch, .* not built; install a C compiler") as caught:
        assert backends.choose_backend(x, "int4", 200, 64).name == "reference"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose_backend(x, "int4", 200, 64)
    with pytest.raises(ValueError, match=r"cannot run: its C library was not built"):
        cpu.bind(*arguments())


def test_a_library_that_is_no_library_is_reported(tmp_path):
    path = tmp_path / "libvlmq_cpu.so"
    path.write_bytes(b"no library")
    assert "cannot be opened" in library.open_library(path)


def test_reasons_are_words():
    assert cpu.why_not(torch.empty(2, 8, device="meta"), "int4", 8, 0) == "runs on a CPU, not on meta"
    reason = cpu.why_not(torch.empty(2, 8, dtype=torch.double), "int4", 8, 0)
    assert reason == "computes in float32, bfloat16 and float16, not in torch.float64"
