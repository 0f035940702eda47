"""The benchmark of the CPU kernels: its bookkeeping, on layers small enough to be quick."""

import pytest

from vlmq.eval import bench_cpu as bench
from vlmq.kernels.library import open_library

pytestmark = pytest.mark.skipif(isinstance(open_library(), str), reason="no C library")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SIZE", 256)
    monkeypatch.setattr(bench, "PEAK_SIZE", 64)
    monkeypatch.setattr(bench, "ROTATION_BYTES", 2**18)


def test_every_format_is_timed_against_torch_and_memory(small):
    table, record = bench.bench_cpu(1, n_rounds=8, isas=["portable"], peers=())
    rows = {(row["name"], row["isa"]): row for row in record["rows"]}
    assert len(rows) == len(table.rows) == 3 + len(bench.FORMATS)
    assert rows["read", "torch"]["bandwidth_share"] == 1
    assert rows["bfloat16", "torch"]["speedup"] == 1
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in rows.values())
    assert rows["bfloat16", "torch"]["bits_per_weight"] == 16
    assert all(0 < row["error"] < 0.05 for name, row in rows.items() if name[0] != "read")
    ternary = rows["ternary-channel", "portable"]
    assert ternary["bits_per_weight"] == 2 + 16 / 256
    assert ternary["gb_per_second"] * ternary["ms"] * 1e6 == pytest.approx(256 * 256 / 4 + 2 * 256)


def test_the_points_of_the_roofline_are_those_of_the_table(small, monkeypatch):
    monkeypatch.setattr(bench.bench_cpu_peers.peers, "find_spec", lambda name: None)
    _, record = bench.bench_cpu(1, n_rounds=4, isas=["portable"])
    missing = {row["name"]: row for row in record["rows"] if row["ms"] is None}
    assert missing.keys() == {"bitsandbytes", "GPTQModel", "torchao"}
    assert missing["torchao"]["isa"] == "not installed: pip install torchao"
    points, bandwidth = bench.roofline_points(record)
    assert len(points) == len(record["rows"]) - 1 - len(missing)
    assert bandwidth == pytest.approx(1e9 * record["rows"][0]["gb_per_second"])
    assert points[0].n_bytes == pytest.approx(2 * 256 * 256)


@pytest.mark.parametrize(("isas", "n_rounds"), [(["sse1"], 8), (["portable"], 3)])
def test_unknown_paths_and_too_few_rounds_are_refused(small, isas, n_rounds):
    with pytest.raises(ValueError, match="expected paths among"):
        bench.bench_cpu(1, n_rounds=n_rounds, isas=isas)


def test_rows_do_not_always_follow_the_same_row():
    calls = []
    names = "read", "bfloat16", "a", "b"
    turns = {
        (name, "torch"): bench.Turn(lambda i, name=name: calls.append(name) or 1.0, 8, 16, 0.0)
        for name in names
    }
    bench.measure(turns, 20)
    rounds = [calls[k : k + len(names)] for k in range(0, len(calls), len(names))]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 5


def test_a_slow_row_takes_few_turns():
    turns = []
    fast, slow = (
        bench.Turn(lambda i: turns.append(i) or 1.0, 8, 16, 0.0, is_slow) for is_slow in (False, True)
    )
    table = bench.measure({("read", "torch"): fast, ("bfloat16", "torch"): slow}, 14)
    assert sorted(i for i in set(turns) if turns.count(i) == 2) == [2, 12]
    assert len(turns) == 14 + 2
    assert table.rows[0][2] == table.rows[1][2] == 1
