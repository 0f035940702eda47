"""`vlmq bench`: presets and their packed variants, the files it writes, what it refuses."""

import json
import sys

import pytest

from vlmq import cli, cli_bench
from vlmq.cli_bench import expand
from vlmq.eval.report import Column, Table


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
    monkeypatch.setattr(cli_bench, "bench_cpu", lambda threads: (table, record))
    code, text, err = run(monkeypatch, capsys, "--kernels", "--json", "--out", str(tmp_path / "k"))
    assert code == 0
    assert json.loads(text)["rows"] == rows
    assert "load average 9.0" in err
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == [
        "kernels.json",
        "kernels.md",
        "roofline.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preset:nope"], "unknown; known:"),
        (["./nope", "--scheme", "int4"], "pack a checkpoint with vlmq quantize"),
        ([], "takes models to measure, or --kernels"),
        (["preset:llama-tiny", "--kernels"], "and not both"),
        (["--kernels", "--device", "cuda"], "for a GPU"),
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
