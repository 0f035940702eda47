"""The comparison with llama.cpp: a stand-in for its package, engines that take turns, and what is refused."""

import json

import pytest

from vlmq.eval import bench_llama_cpp
from vlmq.eval.bench_llama_cpp import check, count_same
from vlmq.eval.engines import Spec, start

SHORT = {"n_prompt": 4, "n_new": 3, "n_runs": 2}
STAND_IN = """
class Threads:
    n_threads = 0
class Model:
    path = ""
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = Model(), Threads(), Threads()
class Server:
    def __init__(self, params):
        self.threads = params.cpuparams.n_threads, params.cpuparams_batch.n_threads
        if not params.model.path.endswith(".gguf"):
            raise RuntimeError("cannot read " + params.model.path)
    def handle_completions(self, request):
        print("what a library prints")
        assert self.threads == (1, 1) and len(request["prompt"]) == 4
        n = request["max_tokens"]
        text = " ".join(str(7 + i) for i in range(n))
        return {"choices": [{"text": text}], "timings": {"predicted_n": n, "predicted_ms": 500.0, "prompt_ms": 2000.0}}
def get_system_info():
    return "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 | "
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package xllamacpp that answers at once, for this process and those it starts."""
    folder = tmp_path / "packages"
    (folder / "xllamacpp-1.0.dist-info").mkdir(parents=True)
    (folder / "xllamacpp-1.0.dist-info/METADATA").write_text("Name: xllamacpp\nVersion: 1.0\n")
    (folder / "xllamacpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def test_both_engines_take_turns_and_are_compared(stand_in):
    steps = []
    tables, content = bench_llama_cpp.bench_llama_cpp(
        "llama-tiny", ["int4-g64", "int8-g64"], [1], report=steps.append, **SHORT
    )
    assert steps[:2] == ["packing llama-tiny in int4-g64", "writing llama-tiny in Q4_0"]
    (records,) = content["groups"]
    names = [(r["engine"], r["layers"], r["against"]) for r in records]
    assert names == [
        ("vlmq", "int4-g64", "Q4_0"),
        ("llama.cpp", "Q4_0", "Q4_0"),
        ("vlmq", "int8-g64", "Q8_0"),
        ("llama.cpp", "Q8_0", "Q8_0"),
    ]
    vlmq, theirs = records[:2]
    # two tokens after the first in half a second
    assert (theirs["tokens_per_second"], theirs["ratio"], theirs["first_token"]) == (4.0, 1.0, 2.0)
    assert (theirs["path"], theirs["bits_per_weight"], theirs["n_same"]) == ("avx2", 4.5, 3)
    assert vlmq["ratio"] == pytest.approx(vlmq["tokens_per_second"] / 4.0, rel=0.5)
    assert vlmq["slowest"] <= vlmq["tokens_per_second"] <= vlmq["fastest"]
    assert vlmq["bits_per_weight"] == 4.375
    assert min(r["megabytes"] for r in records) > 0.2
    assert len(tables[0].rows) == 4
    assert content["versions"]["xllamacpp"] == "1.0"
    json.dumps(content)


def test_an_engine_that_fails_says_why(stand_in):
    with (
        start(Spec("llama.cpp", "model.bin", 1, [1, 2, 3, 4], 3)) as engine,
        pytest.raises(RuntimeError, match="llama.cpp on model.bin: RuntimeError: cannot read model.bin"),
    ):
        engine.run()


def test_its_process_ends_with_the_context(stand_in):
    with start(Spec("llama.cpp", "model.gguf", 1, [1, 2, 3, 4], 3)) as engine:
        assert engine.run()["tokens"] == [7, 8, 9]
    assert engine.child.process.poll() is not None


@pytest.mark.parametrize(
    ("preset", "schemes", "counts", "message"),
    [
        ("nope", ["int4"], {}, "preset 'nope' is unknown"),
        ("qwen2.5-vl-7b", ["int4"], {}, "only a Llama"),
        ("llama-2048", [], {}, "needs a --scheme"),
        ("llama-2048", ["binary-g64"], {}, "no type for scheme 'binary-g64'"),
        ("llama-tiny", ["ternary-g64"], {}, "TQ2_0 takes widths of 256 n"),
        ("llama-2048", ["int4"], {"n_new": 1}, "at least 2 new tokens"),
    ],
)
def test_wrong_input_is_found_before_any_work(stand_in, preset, schemes, counts, message):
    with pytest.raises(ValueError, match=message):
        check(preset, schemes, **counts)


def test_a_missing_package_is_named_first(monkeypatch):
    monkeypatch.setattr(bench_llama_cpp, "find_spec", lambda name: None if name == "xllamacpp" else name)
    with pytest.raises(ValueError, match="pip install xllamacpp$"):
        bench_llama_cpp.bench_llama_cpp("nope", [], [1])


def test_counts_leading_tokens_that_are_the_same():
    assert [count_same(a, [1, 2, 3]) for a in ([1, 2, 3], [1, 2, 4], [2, 2, 3], [1, 2])] == [3, 2, 0, 2]


def test_the_widths_of_blocks_are_those_of_gguf():
    from vlmq.eval.gguf_model import block_of

    assert {
        name: block_of(name)[0] for name in bench_llama_cpp.BLOCK_WEIGHTS
    } == bench_llama_cpp.BLOCK_WEIGHTS
    assert {t for types in bench_llama_cpp.COUNTERPARTS.values() for t in types} <= set(
        bench_llama_cpp.BLOCK_WEIGHTS
    )
