"""Measuring whole models: in processes of their own, against the first, and wrong jobs found before the first."""

import json
import subprocess

import pytest
import tiny_models
import torch
from tiny_processors import build as build_processor

import vlmq
from vlmq.eval import bench_models
from vlmq.eval.bench_models import Job, check_job, measure

SHORT = {"threads": 1, "n_new": 3, "n_runs": 1, "n_prompt": 4}


def test_models_are_measured_against_the_first_in_other_processes():
    jobs = [Job("preset:llama-tiny", **SHORT), Job("preset:llama-tiny@ternary-g64", **SHORT)]
    steps = []
    table, records = bench_models.bench_models(jobs, report=steps.append)
    assert steps == ["1/2 preset:llama-tiny", "2/2 preset:llama-tiny@ternary-g64"]
    assert [r["model"] for r in records] == [j.model for j in jobs]
    dense, packed = records
    assert dense["speedup"] == 1
    assert packed["speedup"] == packed["tokens_per_second"] / dense["tokens_per_second"]
    assert (dense["bits_per_weight"], packed["bits_per_weight"]) == (16, 2.25)
    assert packed["weight_megabytes"] < dense["weight_megabytes"]
    assert min(r["peak_megabytes"] for r in records) > 1
    assert len(table.rows) == 2
    json.dumps(records)


def test_a_checkpoint_with_a_processor_is_asked_about_an_image(tmp_path):
    model = tiny_models.build("llava", torch.bfloat16)
    processor = build_processor("llava")
    vlmq.quantize(model, tiny_models.inputs("llava", 1), "int4-g16")
    vlmq.save(model, tmp_path / "packed", processor)
    text = tmp_path / "text.txt"
    text.write_text("some words to be measured. " * 60)
    record = measure(Job(str(tmp_path / "packed"), **SHORT | {"threads": None}, text=str(text), n_windows=1))
    assert record["n_prompt"] > 4
    assert record["perplexity"] > 1
    assert record["decode_perplexity"] == pytest.approx(record["perplexity"], rel=0.05)
    assert record["megabytes"] > 0


def test_a_process_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\n\nRuntimeError: out of memory\n")
    monkeypatch.setattr(bench_models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="llama-tiny: RuntimeError: out of memory"):
        bench_models.bench_models([Job("preset:llama-tiny")])


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("preset:nope"), "preset 'nope' is unknown"),
        (Job("./nope"), "no such folder"),
        (Job("preset:llama-tiny", text="nope.txt"), "no file 'nope.txt'"),
        (Job("preset:llama-tiny", n_new=1), "at least 2 new tokens"),
    ],
)
def test_wrong_jobs_are_found_before_any_is_started(job, message, monkeypatch):
    monkeypatch.setattr(bench_models.subprocess, "run", lambda *_, **__: pytest.fail("was started"))
    with pytest.raises(ValueError, match=message):
        check_job(job)
    with pytest.raises(ValueError, match=message):
        bench_models.bench_models([Job("preset:llama-tiny"), job])
