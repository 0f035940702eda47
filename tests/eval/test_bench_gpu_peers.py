"""Other packages on a GPU, without one: lines of a measurement, failures, time, a clear end without a GPU."""

import json
import sys

import pytest
import torch

from vlmq.eval import bench_gpu_peers, peers
from vlmq.eval.bench_gpu_peers import TOKENS, measure, plan_peer, run_peers, size_of
from vlmq.eval.peers import Peer, PeerLayer, Row

pytest.importorskip("triton")
ROW = Row("bitsandbytes", "nf4-g64")


@pytest.fixture
def only_bitsandbytes(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name == "bitsandbytes" or None)


def python(code):
    return (sys.executable, "-c", code)


def fake(monkeypatch, build):
    monkeypatch.setitem(peers.PEERS, "bitsandbytes", Peer("json", "bitsandbytes", build))
    monkeypatch.setattr(peers, "version_of", lambda name: "1.0")


def lines_of(replay=lambda calls: [call() is not None for call in calls]):
    return list(measure(ROW, 128, 64, "cpu", tokens=(1, 20), replay=replay))


def test_line_says_what_was_measured(monkeypatch):
    def build(row, weight, n_copies):
        return PeerLayer([lambda x: x @ weight.T] * 3, weight.float(), 64 * 128 // 2, "fake")

    fake(monkeypatch, build)
    one, many = lines_of(lambda calls: [0.25, 0.5, 1.0])
    assert (one["kernel"], one["format_name"], one["group_size"], one["n_tokens"]) == (
        "bitsandbytes",
        "nf4",
        64,
        1,
    )
    assert one["bytes"] == 64 * 128 // 2 + 2 * (64 + 128)
    assert (one["seconds"], one["spread"], one["bits_per_weight"]) == (0.5, [0.25, 1.0], 4)
    assert 0 < one["error"] < 1e-2
    assert many["n_tokens"] == 20


def test_layer_that_cannot_be_made_is_one_line(monkeypatch):
    def build(row, weight, n_copies):
        raise ImportError("needs nvcc\nand more")

    fake(monkeypatch, build)
    (line,) = lines_of()
    assert line["failed"] == "ImportError: needs nvcc"


def test_failure_of_one_number_of_tokens_leaves_the_others(monkeypatch):
    def build(row, weight, n_copies):
        return PeerLayer([lambda x: x @ weight.T] * 3, weight.float(), 64 * 128 // 2, "fake")

    def replay(calls):
        if len(calls[0]()) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [1.0]

    fake(monkeypatch, build)
    one, many = lines_of(replay)
    assert "stream is capturing" in one["failed"]
    assert many["seconds"] == 1


def test_lines_failures_and_what_was_not_reached_are_kept_apart(only_bitsandbytes):
    (row, *size) = plan_peer("bitsandbytes")[0]
    measured = size_of(row, *size, TOKENS[0]) | {"seconds": 1.0}
    failed = size_of(row, *size, TOKENS[1]) | {"failed": "RuntimeError: no"}
    code = f"import sys; print({json.dumps(measured)!r}); print({json.dumps(failed)!r}); print('chatter')"
    lines, missing = run_peers(60, "cuda:0", command=python(code))
    assert lines == [measured]
    assert [line["error"] for line in missing["failed"]] == ["RuntimeError: no"]
    # The rest of a layer that failed is not tried; the next layer was not reached.
    assert [line["n_tokens"] for line in missing["skipped_for_time"]] == list(TOKENS)
    assert {line["kernel"] for line in missing["not_installed"]} == {"GPTQModel", "GemLite"}


def test_process_that_ends_is_a_failure_with_its_last_line(only_bitsandbytes):
    code = "import sys; assert sys.argv[1:] == ['bitsandbytes', 'cuda:1']; sys.exit('illegal instruction')"
    lines, missing = run_peers(60, "cuda:1", command=python(code))
    assert lines == []
    assert missing["failed"] == [{"kernel": "bitsandbytes", "error": "illegal instruction"}]
    assert missing["skipped_for_time"] == []


def test_time_that_is_over_starts_nothing(only_bitsandbytes):
    lines, missing = run_peers(0, "cuda:0", command=python("raise SystemExit('started')"))
    assert (lines, missing["failed"]) == ([], [])
    assert len(missing["skipped_for_time"]) == len(plan_peer("bitsandbytes")) * len(TOKENS)


@pytest.mark.parametrize(
    ("arguments", "message"), [(["GemLite"], "finds none here"), (["nope"], "expected one of")]
)
def test_without_a_gpu_or_a_known_package_it_says_so(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu_peers", *arguments])
    with pytest.raises(SystemExit, match=message):
        bench_gpu_peers.main()
