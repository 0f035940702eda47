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
    table, record = bench.bench_cpu(1, n_rounds=8, isas=["portable"])
    rows = {(row["name"], row["isa"]): row for row in record["rows"]}
    assert len(rows) == len(table.rows) == 3 + len(bench.FORMATS)
    assert rows["read", "torch"]["bandwidth_share"] == 1
    assert rows["bfloat16", "torch"]["speedup"] == 1
    assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in rows.values())
    ternary = rows["ternary-channel", "portable"]
    assert ternary["gb_per_second"] * ternary["ms"] * 1e6 == pytest.approx(256 * 256 / 4 + 2 * 256)


def test_the_points_of_the_roofline_are_those_of_the_table(small):
    _, record = bench.bench_cpu(1, n_rounds=4, isas=["portable"])
    points, bandwidth = bench.roofline_points(record)
    assert len(points) == len(record["rows"]) - 1
    assert bandwidth == pytest.approx(1e9 * record["rows"][0]["gb_per_second"])
    assert points[0].n_bytes == pytest.approx(2 * 256 * 256)


@pytest.mark.parametrize(("isas", "n_rounds"), [(["sse1"], 8), (["portable"], 3)])
def test_unknown_paths_and_too_few_rounds_are_refused(small, isas, n_rounds):
    with pytest.raises(ValueError, match="expected paths among"):
        bench.bench_cpu(1, n_rounds=n_rounds, isas=isas)
