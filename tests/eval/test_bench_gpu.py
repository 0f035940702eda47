"""The bookkeeping of the GPU measurements: the plan, the bytes, the ratios; and a clear end without a GPU."""

import json

import pytest
import torch
from random_weights import random_weight

from vlmq.eval import bench_gpu, bench_gpu_layers
from vlmq.eval.bench_gpu import with_ratios
from vlmq.eval.bench_gpu_layers import Case, plan
from vlmq.eval.bench_gpu_table import models_table, results_table
from vlmq.kernels.packing import pack


def test_plan_holds_each_size_for_each_kernel():
    cases = plan()
    assert len(set(cases)) == len(cases)
    for layer in bench_gpu_layers.LAYERS:
        for n_tokens in (1, 16, 2048):
            here = [c for c in cases if ((c.in_features, c.out_features), c.n_tokens) == (layer, n_tokens)]
            assert {"torch-bf16", "vlmq"} <= {c.kernel for c in here}
    assert {c.format_name for c in cases if c.kernel == "vlmq-a8"} == {"int2", "ternary", "binary"}


def test_bytes_are_those_of_the_packed_weight():
    io = 2 * (4096 + 14336)
    assert Case("torch-bf16", "", 0, 4096, 14336, 1).bytes_read == 2 * 4096 * 14336 + io
    assert Case("vlmq", "ternary", 0, 4096, 14336, 1).bytes_read == 4096 * 14336 // 4 + 2 * 14336 + io
    with_zero = 4096 * 14336 // 2 + 3 * 14336 * 32 + io
    assert Case("vlmq", "int4", 128, 4096, 14336, 1).bytes_read == with_zero


@pytest.mark.parametrize("n_tokens", [1, 2048])
def test_a_wrong_product_of_any_number_of_tokens_is_not_timed(monkeypatch, n_tokens):
    triton_tune = pytest.importorskip("vlmq.kernels.triton_tune", reason="triton is not installed")
    from vlmq.kernels import reference, triton_linear

    weight = random_weight("ternary", 9, 256, None)
    packed = (pack(weight.codes, 2), weight.scales, weight.zeros)
    monkeypatch.setattr(triton_tune, "cold_weights", lambda _: [packed] * 3)
    case, x = Case("vlmq", "ternary", 0, 256, 9, n_tokens), torch.randn(n_tokens, 256)
    monkeypatch.setattr(triton_linear, "quant_linear", reference.quant_linear)
    assert len(bench_gpu_layers._vlmq_calls(case, x)) == 3

    def wrong_if_all(rows, *rest):
        return reference.quant_linear(rows, *rest) * (2 if len(rows) == n_tokens else 1)

    monkeypatch.setattr(triton_linear, "quant_linear", wrong_if_all)
    with pytest.raises(RuntimeError, match="differs from the reference"):
        bench_gpu_layers._vlmq_calls(case, x)


def test_layers_of_one_input_are_timed_together_and_apart(monkeypatch):
    triton_tune = pytest.importorskip("vlmq.kernels.triton_tune", reason="triton is not installed")
    from vlmq.kernels import reference, triton_linear

    monkeypatch.setattr(bench_gpu_layers, "JOINT_WIDTHS", (9, 5))
    launches = []

    def pack_random(shape):
        weight = random_weight("ternary", shape.out_features, 256, None)
        return [(pack(weight.codes, 2), weight.scales, weight.zeros)] * 3

    def quant_linears(x, layers, *sizes):
        launches.append(len(layers))
        return torch.cat([reference.quant_linear(x, *layer, *sizes).flatten() for layer in layers])

    monkeypatch.setattr(triton_tune, "cold_weights", pack_random)
    monkeypatch.setattr(triton_linear, "quant_linears", quant_linears)
    x = torch.randn(1, 256)
    for kernel, expected in (("vlmq-joint", [2]), ("vlmq-apart", [1, 1])):
        calls = bench_gpu_layers._joint_calls(Case(kernel, "ternary", 0, 256, 14, 1), x)
        assert launches == [2]  # the check
        launches.clear()
        calls[1]()
        assert launches == expected
        launches.clear()
    monkeypatch.setattr(triton_linear, "quant_linears", lambda *args: 2 * quant_linears(*args))
    with pytest.raises(RuntimeError, match="differs from the reference"):
        bench_gpu_layers._joint_calls(Case("vlmq-joint", "ternary", 0, 256, 14, 1), x)


def test_ratio_is_to_bf16_of_the_same_size():
    size = {"in_features": 8, "out_features": 4, "n_tokens": 1}
    other = size | {"n_tokens": 2}
    lines = [
        {"kernel": "torch-bf16", "seconds": 6.0, **size},
        {"kernel": "vlmq", "seconds": 2.0, **size},
        {"kernel": "vlmq", "seconds": 2.0, **other},
    ]
    assert [line["over_bf16"] for line in with_ratios(lines)] == [1.0, 3.0, None]


def test_dry_run_lists_every_measurement(capsys):
    bench_gpu.main(["--dry-run"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    n_kernels = len(plan())
    assert all(line["bytes"] > 0 and line["operations"] > 0 for line in lines[:n_kernels])
    others = [line for line in lines[n_kernels:] if "kernel" in line]
    assert {line["kernel"] for line in others} == {
        "bitsandbytes",
        "GPTQModel",
        "GPTQModel gptq_marlin",
        "GemLite",
    }
    n_kernels += len(others)
    models = {(line["scheme"], line["backend"], line["mode"]) for line in lines[n_kernels:]}
    assert {(None, None, "graph"), ("ternary-channel", "triton-a8", "compiled graph")} < models
    assert len(models) == len(lines) - n_kernels


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main(["--out", str(tmp_path / "results.json")])
    assert "finds none here" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_a_failing_case_is_kept_and_the_others_go_on(monkeypatch, tmp_path):
    def measure(case, limits):
        if case.kernel == "torch-int4":
            raise RuntimeError("no such operator")
        size = {"in_features": case.in_features, "out_features": case.out_features, "n_tokens": case.n_tokens}
        return {"kernel": case.kernel, "seconds": 1.0, **size}

    def run_peers(seconds, device, *, report):
        assert 0 < seconds <= bench_gpu.PEER_SECONDS
        size = {"in_features": 4096, "out_features": 4096, "n_tokens": 1, "bytes": 10**8}
        missing = {
            "failed": [{"kernel": "GemLite", "error": "x"}],
            "skipped_for_time": [],
            "not_installed": [],
        }
        return [{"kernel": "bitsandbytes", "seconds": 0.5, **size}], missing

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_gpu, "measure", measure)
    monkeypatch.setattr(bench_gpu, "run_peers", run_peers)
    monkeypatch.setattr(bench_gpu, "ceilings", lambda: {"copy_bytes_per_second": 1e9})
    given = []

    def run_models(jobs, seconds, bandwidth, *, report, save):
        given.append((jobs, seconds, bandwidth))
        save({"models": [{"tokens_per_second": 3.0}], "failed": [], "skipped_for_time": []})

    monkeypatch.setattr(bench_gpu, "run_models", run_models)
    cases, jobs = plan(), bench_gpu.plan_models()
    result = bench_gpu.run_all(cases, jobs, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert result["models"]["models"] == [{"tokens_per_second": 3.0}]
    assert [(given[0][0], given[0][2])] == [(jobs, 1e9)]
    assert 0 < given[0][1] <= bench_gpu.LIMIT_SECONDS
    n_failed = sum(case.kernel == "torch-int4" for case in cases)
    assert len(result["failed"]) == n_failed > 0
    assert {line["error"] for line in result["failed"]} == {"RuntimeError: no such operator"}
    assert len(result["measurements"]) == len(cases) - n_failed + 1
    peer = result["measurements"][-1]
    assert (peer["over_bf16"], peer["share"]) == (2, 0.2)
    assert result["peers"]["failed"] == [{"kernel": "GemLite", "error": "x"}]


def test_script_is_planned_below_eight_minutes():
    assert bench_gpu.KERNEL_SECONDS + bench_gpu.PEER_SECONDS < bench_gpu.LIMIT_SECONDS <= 460


def test_packages_that_did_not_run_are_rows_of_the_table():
    missing = {"not_installed": [{"kernel": "GemLite", "error": "not installed: pip install gemlite"}]}
    missing |= {"failed": [{"kernel": "GPTQModel", "error": "needs nvcc"}], "skipped_for_time": []}
    table = results_table({"gpu": "a GPU", "measurements": [], "peers": missing})
    assert [row[:3] for row in table.rows] == [
        ("GemLite", "not installed: pip install gemlite", None),
        ("GPTQModel", "needs nvcc", None),
    ]


def test_models_of_a_result_are_a_table():
    line = {"scheme": "ternary-channel", "backend": "triton-a8", "mode": "graph", "tokens_per_second": 300.0}
    line |= {"spread": [290.0, 310.0], "over_bf16": None, "share": 0.4, "first_token": 0.1}
    line |= {"weight_megabytes": 3000.0, "peak_megabytes": 4000.0}
    table = models_table({"gpu": "a GPU", "models": {"models": [line]}})
    assert table.rows == (
        ("ternary-channel (triton-a8)", "graph", 300.0, 290.0, None, 0.4, 0.1, 3000.0, 4000.0),
    )
