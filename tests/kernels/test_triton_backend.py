"""The table's entry for the Triton kernels: its reasons in words, and no import of triton before it is used."""

import subprocess
import sys

import pytest
import torch

from vlmq.kernels import triton_backend
from vlmq.kernels.backends import BACKENDS, choose_backend, explain


class OnGpu:
    """What the entry looks at of a tensor on a GPU, without one."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype = dtype
        self.device = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Let a GPU of this compute capability be there."""

    def put(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        triton_backend._why_not_on.cache_clear()

    yield put
    triton_backend._why_not_on.cache_clear()


def test_entry_is_never_chosen_on_a_cpu(monkeypatch):
    monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    x = torch.randn(2, 72)
    assert explain(x, "int4", 72, 64)["triton"] == "runs on NVIDIA GPUs, x is on cpu"
    assert choose_backend(x, "int4", 72, 64).name != "triton"


def test_entry_comes_before_the_reference():
    names = [backend.name for backend in BACKENDS]
    assert names.index("triton") < names.index("triton-a8") < names.index("reference")


def test_8_bit_activations_are_never_chosen_unasked(capability, monkeypatch):
    pytest.importorskip("triton")
    capability(9, 0)
    monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    assert choose_backend(OnGpu(torch.half), "ternary", 128, 0).name == "triton"
    monkeypatch.setenv("VLMQ_BACKEND", "triton-a8")
    assert choose_backend(OnGpu(torch.half), "ternary", 128, 0).name == "triton-a8"


@pytest.mark.parametrize("dtype", triton_backend.DTYPES)
def test_entry_takes_its_dtypes_on_ampere_and_later(dtype, capability):
    pytest.importorskip("triton")
    capability(8, 0)
    assert triton_backend.why_not(OnGpu(dtype), "int4", 72, 64) is None


def test_entry_names_what_is_missing(capability, monkeypatch):
    capability(7, 5)
    assert triton_backend.why_not(OnGpu(torch.float64), "int4", 72, 64) == (
        "takes float16, bfloat16 and float32, x is torch.float64"
    )
    assert triton_backend.why_not(OnGpu(torch.half), "int4", 72, 64) == (
        "needs compute capability 8.0, this GPU has 7.5"
    )
    triton_backend._why_not_on.cache_clear()
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    assert triton_backend.why_not(OnGpu(torch.half), "int4", 72, 64) == "triton is not installed"


def test_operator_does_not_import_the_kernels():
    code = "import sys, vlmq.linear; print([m for m in sys.modules if m.startswith('vlmq.kernels.triton_')])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert out.stdout.strip() == "['vlmq.kernels.triton_backend']"
