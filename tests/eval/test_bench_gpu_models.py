"""The whole models of the GPU benchmark: a tiny one on the CPU, and made-up processes for time and failures."""

import json
import sys

import pytest
import torch

from vlmq.eval import bench_gpu_models
from vlmq.eval.bench_gpu_models import MODES, ModelJob, measure, plan_models, run_models
from vlmq.eval.presets import PRESETS
from vlmq.scheme import parse_scheme

TINY = ModelJob("llama-tiny", device="cpu", n_prompt=7, n_new=5, n_runs=2)
LINE = {"scheme": None, "tokens_per_second": 50.0, "bytes_per_token": 4}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_planned_models_exist():
    jobs = plan_models()
    assert jobs[0].scheme is None
    for job in jobs:
        assert job.preset in PRESETS
        assert job.scheme is None or parse_scheme(job.scheme)
    assert "triton-a8" in {job.backend for job in jobs}


@pytest.mark.parametrize("scheme", [None, "ternary-channel"])
def test_tiny_model_is_measured_in_both_modes(scheme):
    job = ModelJob(**{**vars(TINY), "scheme": scheme})
    records = list(measure(job, capture=lambda step: step, compiler="aot_eager"))
    assert [record["mode"] for record in records] == list(MODES)
    for record in records:
        assert record["same_tokens"]
        low, high = record["spread"]
        assert 0 < low <= record["tokens_per_second"] <= high
        assert record["first_token"] > 0
        assert record["peak_megabytes"] > 0
    json.dumps(records)


def test_bytes_of_a_token_are_the_weights_and_the_cache_without_the_embedding():
    record = next(measure(TINY, capture=lambda step: step))
    # two blocks: four projections, three of the feed-forward, two norms; the last norm and the head; keys and values
    blocks = 2 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128)
    cache = 2 * 2 * 128 * (7 + 5)
    assert record["bytes_per_token"] == 2 * (blocks + 128 + 128 * 512 + cache)


@pytest.mark.parametrize("changed", [{"preset": "none"}, {"n_new": 1}, {"n_prompt": 0}, {"n_runs": 0}])
def test_impossible_job_is_refused(changed):
    with pytest.raises(ValueError, match="expected one of"):
        next(measure(ModelJob(**{**vars(TINY), **changed})))


def test_a_failing_process_keeps_what_it_printed_and_the_others_go_on():
    code = f"import sys; print('noise'); print('''{json.dumps(LINE | {'mode': 'graph'})}'''); sys.exit('no memory')"
    saved, told = [], []
    result = run_models([TINY, TINY], 60, 1000.0, command=python(code), save=saved.append, report=told.append)
    assert [line["share"] for line in result["models"]] == [0.2, 0.2]
    assert [line["over_bf16"] for line in result["models"]] == [1.0, 1.0]
    assert [line["error"] for line in result["failed"]] == ["no memory"] * 2
    assert result["skipped_for_time"] == []
    assert len(saved) == 2
    assert len(told) == 4


def test_a_process_without_time_left_is_ended_and_its_missing_modes_are_named():
    code = f"import time; print('''{json.dumps(LINE | {'mode': 'graph'})}''', flush=True); time.sleep(60)"
    result = run_models([TINY], 4.0, 1.0, command=python(code))
    assert [line["mode"] for line in result["models"]] == ["graph"]
    assert [line["mode"] for line in result["skipped_for_time"]] == ["compiled graph"]
    assert result["failed"] == []
    result = run_models([TINY], 0.0, 1.0, command=python("raise SystemExit('started')"))
    assert [line["mode"] for line in result["skipped_for_time"]] == list(MODES)
    assert result["failed"] == []


def test_process_is_told_the_backend(monkeypatch):
    monkeypatch.delenv("VLMQ_BACKEND", raising=False)
    code = "import os, sys; sys.exit(os.environ.get('VLMQ_BACKEND', 'none'))"
    jobs = [TINY, ModelJob(**{**vars(TINY), "backend": "triton-a8"})]
    result = run_models(jobs, 60, 1.0, command=python(code))
    assert [line["error"] for line in result["failed"]] == ["none", "triton-a8"]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu_models", json.dumps(vars(TINY))])
    with pytest.raises(ValueError, match="finds none here"):
        bench_gpu_models.main()
