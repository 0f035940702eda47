"""Layers of other packages: what they hold, how they are counted, and, where a package is installed, their output."""

import pytest
import torch

from vlmq.eval import bench_cpu_peers, peers
from vlmq.eval.bench_cpu_peers import Answers, Spec, open_rows
from vlmq.eval.peers import CPU_ROWS, GPU_ROWS, Peer, PeerLayer, relative_error, round_symmetric

SPEC = Spec("bitsandbytes", 1, 256, 2**16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_rounded_within_half_a_step(bits):
    weight = torch.randn(8, 256).bfloat16()
    codes, scales = round_symmetric(weight, bits)
    middle = 2 ** (bits - 1)
    assert int(codes.max()) < 2 * middle
    assert torch.equal(scales, scales.bfloat16().float())
    values = (codes.float() - middle) * scales.repeat_interleave(128, 1)
    step = scales.repeat_interleave(128, 1)
    # The scale itself is rounded, so the largest weights may be cut by a little more.
    assert bool(((values - weight.float()).abs() <= 0.5 * step + 2.0**-7 * weight.float().abs()).all())


def test_error_is_relative_to_float64():
    values, x = torch.eye(4), torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    assert relative_error(torch.tensor([[3.0, 0.5, 4.0, 0.0]]), values, x) == pytest.approx(0.1)


def test_every_row_is_of_a_known_package():
    assert {row.peer for row in (*CPU_ROWS, *GPU_ROWS)} == set(peers.PEERS)
    assert {row.peer for row in CPU_ROWS} == set(bench_cpu_peers.NAMES)


def test_package_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    rows, not_run = open_rows(None, bench_cpu_peers.NAMES, 1, 256, 2**16)
    assert rows == {}
    assert dict(not_run)["GPTQModel"] == "not installed: pip install gptqmodel"


def fake_package(monkeypatch, build):
    monkeypatch.setitem(peers.PEERS, "bitsandbytes", Peer("json", "bitsandbytes", build))


def test_layers_are_read_in_turn(monkeypatch):
    seen = []

    def build(row, weight, n_copies):
        def call(i):
            return lambda x: seen.append(i) or x @ weight.T

        return PeerLayer([call(i) for i in range(n_copies)], weight.float(), 10, "fake")

    fake_package(monkeypatch, build)
    answers = Answers(SPEC)
    made = answers.answer("open 0")
    n_copies = 2 + 2**16 // (256 * 128)
    assert (made["path"], made["n_bytes"]) == ("fake", 10)
    assert 0 < made["error"] < 1e-2
    seen.clear()
    assert answers.answer("turn 0 1") > 0
    assert seen == [2 % n_copies, 3 % n_copies]


def test_failure_is_a_reason_and_not_the_end(monkeypatch):
    def build(row, weight, n_copies):
        raise ImportError("needs a newer torch\nand more")

    fake_package(monkeypatch, build)
    assert Answers(SPEC).answer("open 0") == {"reason": "ImportError: needs a newer torch"}


def test_process_that_ends_is_a_reason(monkeypatch):
    class Dead:
        def ask(self, line):
            raise RuntimeError("bitsandbytes: exit code -4")

    fake_package(monkeypatch, None)
    monkeypatch.setattr(peers, "version_of", lambda name: "1.0")
    monkeypatch.setattr(bench_cpu_peers.child, "start", lambda *arguments: None)
    stack = type("Stack", (), {"enter_context": lambda self, context: Dead()})()
    rows, not_run = open_rows(stack, ["bitsandbytes"], 1, 256, 2**16)
    assert rows == {}
    assert not_run == [("bitsandbytes 1.0 nf4-g64", "bitsandbytes: exit code -4")]


@pytest.mark.parametrize(
    "number", range(len(CPU_ROWS)), ids=lambda i: f"{CPU_ROWS[i].peer} {CPU_ROWS[i].scheme}"
)
def test_layer_of_an_installed_package_multiplies(number):
    row = CPU_ROWS[number]
    pytest.importorskip(peers.PEERS[row.peer].module)
    torch.manual_seed(0)
    weight, x = torch.randn(128, 256).bfloat16(), torch.randn(1, 256).bfloat16()
    with torch.inference_mode():
        layer = peers.build(row, weight, 2)
        error = peers.error_of(layer, x)
    assert len(layer.calls) == 2
    assert error < 2e-2
    assert row.bits < 8 * layer.n_bytes / weight.numel() < row.bits + 1
    assert float((layer.values - weight.float()).norm() / weight.float().norm()) < 0.85
