"""The table of backends: the order, the reasons in words, the override, and no silent reference on a GPU."""

import warnings

import pytest
import torch

from vlmq.formats import FORMATS
from vlmq.kernels import backends, ops, reference
from vlmq.kernels.backends import BACKENDS, Backend, choose_backend, explain


def backend(name, reason=None, *, forward=reference.quant_linear):
    return Backend(name, lambda x, format_name, in_features, group_size: reason, forward)


@pytest.fixture
def table(monkeypatch):
    """Put entries before the reference."""

    def put(*entries):
        monkeypatch.setattr(backends, "BACKENDS", (*entries, BACKENDS[-1]))

    monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    return put


class OnGpu:
    """What a backend may look at of a tensor on a GPU, without one."""

    is_cuda = True
    device = torch.device("cuda")


def test_names_are_unique_and_the_last_takes_everything():
    *_, last = BACKENDS
    assert len({b.name for b in BACKENDS}) == len(BACKENDS)
    assert last.name == "reference"
    for dtype in (torch.half, torch.double):
        x = torch.randn(2, 72, dtype=dtype)
        assert [last.why_not(x, name, 72, g) for name in FORMATS for g in (0, 16)] == [None] * 2 * len(
            FORMATS
        )


def test_first_that_can_is_chosen(table):
    table(backend("a", "no a here"), backend("b"), backend("c"))
    x = torch.randn(2, 72)
    assert choose_backend(x, "int4", 72, 64).name == "b"
    assert explain(x, "int4", 72, 64) == {"a": "no a here", "b": None, "c": None, "reference": None}


def test_why_not_sees_the_call(table):
    seen = []
    entry = Backend("a", lambda *call: seen.append(call), reference.quant_linear)
    table(entry)
    x = torch.randn(2, 72)
    choose_backend(x, "int4", 72, 64)
    assert seen == [(x, "int4", 72, 64)]


def test_reference_on_a_gpu_warns_once_with_the_reasons(table):
    table(backend("a", "no a in this test"), backend("b", "no b either"))
    with pytest.warns(RuntimeWarning, match=r"a: no a in this test; b: no b either"):
        assert choose_backend(OnGpu(), "int4", 72, 64).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_backend(OnGpu(), "int4", 72, 64)


def test_reference_on_a_cpu_does_not_warn(table):
    table(backend("a", "no a here"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_backend(torch.randn(2, 72), "int4", 72, 64)


def test_override_takes_what_it_names(table, monkeypatch):
    table(backend("a"), backend("b"))
    monkeypatch.setenv("VLMQ_BACKEND", "b")
    assert choose_backend(torch.randn(2, 72), "int4", 72, 64).name == "b"


@pytest.mark.parametrize(
    ("name", "message"),
    [("a", r"VLMQ_BACKEND=a cannot run here: no a here"), ("z", r"'z' is unknown; known: a reference")],
)
def test_override_that_cannot_run_says_so(table, monkeypatch, name, message):
    table(backend("a", "no a here"))
    monkeypatch.setenv("VLMQ_BACKEND", name)
    with pytest.raises(ValueError, match=message):
        choose_backend(torch.randn(2, 72), "int4", 72, 64)


def test_operator_runs_the_chosen_one(table):
    ran = []

    def forward(x, *rest):
        ran.append(x.shape)
        return reference.quant_linear(x, *rest)

    table(backend("mine", forward=forward))
    qweight, scales = torch.zeros(9, 18, dtype=torch.uint8), torch.ones(9, 2, 1, dtype=torch.half)
    ops.quant_linear(torch.randn(2, 72), qweight, scales, None, None, "ternary", 72, 64)
    assert ran == [(2, 72)]


def test_name_of_a_kernel_holds_its_variant(table):
    x = torch.randn(2, 72)
    table(backend("a"))
    assert backends.kernel_name(x, "int4", 72, 64) == "a"
    entry = Backend("b", backend("b").why_not, reference.quant_linear, detail=lambda: "fast")
    table(entry, backend("a"))
    assert backends.kernel_name(x, "int4", 72, 64) == "b (fast)"
