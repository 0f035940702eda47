"""The times beside the one-token kernels: every call runs, and torch has a row beside each of vlmq's."""

import json
import sys

import pytest

from vlmq.eval import bench_decoding
from vlmq.kernels import cpu


@pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")
def test_all_calls_are_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_decoding, "ATTENTIONS", ((4, 2, 32, 9),))
    monkeypatch.setattr(bench_decoding, "LAYERS", ((64, 128, 4, 2, 9),))
    monkeypatch.setattr(bench_decoding, "HEADS", ((128, 64),))
    monkeypatch.setattr(bench_decoding, "SIZE", 128)
    path = tmp_path / "decoding.json"
    monkeypatch.setattr(sys, "argv", ["bench_decoding", "--json", str(path)])
    bench_decoding.main()
    record = json.loads(path.read_text())
    name = "attention, 4 heads of 32, 2 of keys, 9 keys"
    rows = [
        f"{name}: torch",
        f"{name}: vlmq",
        *(
            f"layer, 64 wide, {s}: {how}"
            for s in ("ternary-g64", "int4-g64")
            for how in ("own code", "one call")
        ),
        "head, 128 x 64: torch",
        "head, 128 x 64: vlmq",
        "64 tokens: torch",
        "256 tokens: torch",
        *(
            f"{n_tokens} tokens: {s}{note}"
            for s in ("ternary-g64", "int4-g64")
            for note in ("", ", rounded")
            for n_tokens in (64, 256)
        ),
    ]
    assert list(record["milliseconds"]) == rows
    assert min(record["milliseconds"].values()) > 0
    assert all(row in capsys.readouterr().out for row in rows[:1])
