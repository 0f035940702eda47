"""The measuring of quantize's memory: a record of one call in a process of its own."""

import json
import sys

import pytest

from vlmq.eval import bench_memory


def test_one_call_is_measured(monkeypatch, tmp_path, capsys):
    path = tmp_path / "memory.jsonl"
    options = ["--model", "llama-tiny", "--blocks", "1", "--rows", "2", "--length", "24", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_memory", *options, "--jsonl", str(path)])
    bench_memory.main()
    record = json.loads(path.read_text())
    assert record["n_parameters"] * 2 == record["weight_bytes"]
    assert 0 < record["extra_bytes"] < 2**30
    assert record["times_the_weights"] == pytest.approx(1 + record["extra_bytes"] / record["weight_bytes"])
    assert 0 <= record["layers_done_at_peak"] <= 7
    assert all("." in name for name in record["peak_in"])
    assert "more (" in capsys.readouterr().out
