"""Runs of calls that are read from a forward's source, and what ends one."""

import inspect
import textwrap

import pytest
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.siglip import modeling_siglip

from vlmq.calls import runs_of_calls

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (modeling_llama.LlamaAttention, QKV),
        (modeling_llama.LlamaMLP, ("gate_proj", "up_proj")),
        (modeling_qwen2_5_vl.Qwen2_5_VLAttention, QKV),
        (modeling_siglip.SiglipAttention, QKV),
    ],
)
def test_code_of_transformers_is_read(kind, expected):
    assert runs_of_calls(kind.forward) == (expected,)


def runs(tmp_path, monkeypatch, body: str, head: str = "self, x, y=None"):
    """Runs in a forward of this body; its source must be in a file."""
    name = f"body_{abs(hash((body, head)))}"
    source = f"def forward({head}):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return runs_of_calls(__import__(name).forward)


@pytest.mark.parametrize(
    "between",
    [
        "z = x.view(-1).shape[0] + len(y)",
        "y[0] = self.a_log",
        "y += 1",
        "z = self.norm(y)",
        "y.mul_(2)",
        "assert x.ndim == 2",
    ],
)
def test_a_run_goes_on_where_x_stays(tmp_path, monkeypatch, between):
    assert runs(tmp_path, monkeypatch, f"a = self.q(x)\n{between}\nb = self.k(x)") == (("q", "k"),)


@pytest.mark.parametrize(
    "between",
    [
        "x = y",
        "x += 1",
        "x[0] = 1",
        "x: int = y",
        "x, z = y",
        "print((x := y))",
        "x.mul_(2)",
        "change(x)",
        "change(a=x)",
        "change(*x)",
        "self.norm(x, y)",
        "del x",
        "if y:\n    pass",
        "for i in y:\n    z = i",
        "while y:\n    x = y",
        "with y:\n    pass",
        "try:\n    pass\nexcept ValueError:\n    x = y",
        "z = [y for x in y]",
        "z = y if y else 0",
    ],
)
def test_a_run_ends_where_x_may_change(tmp_path, monkeypatch, between):
    assert runs(tmp_path, monkeypatch, f"a = self.q(x)\n{between}\nb = self.k(x)") == ()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return self.down(self.act(self.gate(x)) * self.up(x))", (("gate", "up"),)),
        ("x = self.a(x)\nreturn self.b(x), self.c(x)", (("b", "c"),)),
        ("if y:\n    return self.a(x) + self.b(x)\nreturn self.c(x)", (("a", "b"),)),
        ("return self.a(x), self.b(y), self.c(x), self.d(y)", (("a", "c"), ("b", "d"))),
        ("return self.a(x), self.b(x), self.a(x)", (("a", "b"),)),
        ("return self.a(x) if y else self.b(x)", ()),
        ("return lambda: self.a(x) + self.b(x)", ()),
        ("return self.a(x, y), self.b(x, y)", ()),
        ("return other.a(x), other.b(x)", ()),
    ],
)
def test_runs_of_other_code(tmp_path, monkeypatch, body, expected):
    assert runs(tmp_path, monkeypatch, body) == expected


def test_code_without_a_source_has_no_runs():
    scope = {}
    exec("def forward(self, x): return self.a(x), self.b(x)", scope)  # noqa: S102
    with pytest.raises(OSError, match="source"):
        inspect.getsource(scope["forward"])
    assert runs_of_calls(scope["forward"]) == ()
    assert runs_of_calls(nn.Module().forward) == ()
