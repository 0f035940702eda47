"""`vlmq bench`: presets and their packed variants, the files it writes, what it refuses."""

import contextlib
import json
import sys

import pytest
import torch

from vlmq import cli, cli_bench
from vlmq.cli_bench import expand
from vlmq.eval.report import Column, Table


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["vlmq", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_bench_prints_json_and_writes_its_files(monkeypatch, capsys, tmp_path):
    short = ("--n-new", "3", "--runs", "1", "--n-prompt", "4", "--threads", "1")
    out = tmp_path / "deep/bench"
    code, text, _ = run(
        monkeypatch, capsys, "preset:llama-tiny", "--scheme", "int4-g64", *short, "--json", "--out", str(out)
    )
    assert code == 0
    content = json.loads(text)
    assert [m["model"] for m in content["models"]] == ["preset:llama-tiny", "preset:llama-tiny@int4-g64"]
    assert json.loads((out / "bench.json").read_text()) == content
    assert "Tokens/s" in (out / "bench.md").read_text()


def test_bench_of_the_kernels_draws_the_roofline(monkeypatch, capsys, tmp_path):
    row = {"name": "read", "isa": "torch", "ms": 1.0, "gb_per_second": 20.0}
    rows = [row, row | {"name": "int4-g64", "isa": "avx2"}]
    record = {"machine": {"load": 9.0}, "torch": "2", "threads": 1, "dense_peak": 1e11, "rows": rows}
    table = Table("t", (Column("name", "Layer"),), (("read",), ("int4-g64",)))
    monkeypatch.setattr(cli_bench, "bench_cpu", lambda threads, report: (table, record))
    code, text, err = run(monkeypatch, capsys, "--kernels", "--json", "--out", str(tmp_path / "k"))
    assert code == 0
    assert json.loads(text)["rows"] == rows
    assert "load average 9.0" in err
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == [
        "kernels.json",
        "kernels.md",
        "roofline.png",
    ]


def test_dry_run_lists_what_a_gpu_would_measure(monkeypatch, capsys, tmp_path):
    out = tmp_path / "k"
    code, text, _ = run(monkeypatch, capsys, "--kernels", "--device", "cuda", "--dry-run", "--out", str(out))
    assert code == 0
    lines = json.loads(text)["measurements"]
    assert {"vlmq", "torch-bf16"} <= {line["kernel"] for line in lines if "kernel" in line}
    assert {"qwen2.5-vl-7b"} == {line["preset"] for line in lines if "preset" in line}
    assert not out.exists()


def test_bench_of_a_gpu_writes_table_and_roofline(monkeypatch, capsys, tmp_path):
    size = {"group_size": 0, "in_features": 4096, "out_features": 4096, "n_tokens": 1, "spread": [1e-5, 3e-5]}
    line = {
        "kernel": "vlmq",
        "format_name": "ternary",
        "seconds": 2e-5,
        "share": 0.5,
        "over_bf16": 4.0,
        "bytes": 4096 * 4096 // 4,
        **size,
    }
    ceilings = {"copy_bytes_per_second": 4e12, "matmul_operations_per_second": 8e14}
    record = {"gpu": "none", "torch": "2", "ceilings": ceilings, "measurements": [line], "failed": [{}]}
    record["skipped_for_time"] = []
    record["peers"] = {"failed": [], "skipped_for_time": [], "not_installed": []}
    record["models"] = {"models": [], "failed": [], "skipped_for_time": [{}]}
    monkeypatch.setattr(cli_bench, "check_gpu", lambda: None)
    monkeypatch.setattr(cli_bench, "bench_gpu", lambda out, report: record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    code, text, err = run(
        monkeypatch, capsys, "--kernels", "--device", "cuda", "--out", str(tmp_path), "--json"
    )
    assert code == 0
    assert json.loads(text) == record
    assert "1 measurements: failed" in err
    assert "1 measurements: skipped_for_time" in err
    assert "| vlmq | ternary-channel | 4096 to 4096 | 1 | 20.0 |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_bench_against_llama_cpp_passes_what_was_asked(monkeypatch, capsys, tmp_path):
    asked = []

    def compare(*arguments, report, **counts):
        asked.append((*arguments, counts))
        return [Table("t", (Column("engine", "Engine"),), (("vlmq",),))], {"machine": {"load": 0.0}}

    monkeypatch.setattr(cli_bench.bench_llama_cpp, "bench_llama_cpp", compare)
    options = ["--scheme", "int4-g64", "--against", "llama.cpp", "--threads", "1", "--runs", "2"]
    code, text, _ = run(monkeypatch, capsys, "preset:llama-2048", *options, "--json", "--out", str(tmp_path))
    assert code == 0
    assert json.loads(text) == {"machine": {"load": 0.0}}
    assert asked == [("llama-2048", ["int4-g64"], [1], {"n_prompt": 64, "n_new": 64, "n_runs": 2})]
    assert "vlmq" in (tmp_path / "against.md").read_text()


def test_bench_against_llama_cpp_without_its_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli_bench.bench_llama_cpp, "find_spec", lambda name: None)
    code, out, err = run(
        monkeypatch, capsys, "preset:llama-2048", "--scheme", "int4", "--against", "llama.cpp"
    )
    assert (code, out) == (2, "")
    assert "pip install xllamacpp gguf" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preset:nope"], "unknown; known:"),
        (["./nope", "--scheme", "int4"], "pack a checkpoint with vlmq quantize"),
        ([], "takes models to measure, or --kernels, or --tune"),
        (["preset:llama-tiny", "--kernels"], "one of them"),
        (["--kernels", "--device", "cuda"], "measures a CUDA GPU, and torch"),
        (["--kernels", "--device", "mps"], "of the CPU or of a CUDA GPU, got --device mps"),
        (["--tune"], "finds none here; run it where the GPU is"),
        (["--tune", "--kernels"], "one of them"),
        (["--kernels", "--dry-run"], "--kernels --device cuda"),
        (["preset:llama-2048", "--against", "nope"], "known: llama.cpp"),
        (["./folder", "--against", "llama.cpp"], "takes one preset"),
        (["preset:llama-2048@int4", "--against", "llama.cpp"], "takes one preset"),
        (["preset:llama-2048", "--against", "llama.cpp", "--vqa", "shapes"], "without --vqa"),
        (["--kernels", "--against", "llama.cpp"], "takes one preset"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())


def test_each_preset_is_followed_by_its_packed_variants():
    models = expand(["folder", "preset:llama-7b", "preset:llama-7b@int2"], ["int4", "ternary"])
    assert models == [
        "folder",
        "preset:llama-7b",
        "preset:llama-7b@int4",
        "preset:llama-7b@ternary",
        "preset:llama-7b@int2",
    ]
