"""Measuring whole models: in processes of their own, against the first, and wrong jobs found before the first."""

import json

import pytest
import tiny_models
import torch
from tiny_processors import build as build_processor

import vlmq
from vlmq.eval import bench_models
from vlmq.eval.bench_models import Job, Measurement, check_job

SHORT = {"threads": 1, "n_new": 3, "n_runs": 2, "n_prompt": 4}


def test_models_are_measured_against_the_first_in_other_processes():
    jobs = [Job("preset:llama-tiny", **SHORT), Job("preset:llama-tiny@ternary-g64", **SHORT)]
    steps = []
    table, records = bench_models.bench_models(jobs, report=steps.append)
    assert steps[:2] == ["first run, not counted", "run 1 of 2"]
    assert [r["model"] for r in records] == [j.model for j in jobs]
    dense, packed = records
    assert dense["speedup"] == 1
    ratios = [a / b for a, b in zip(packed["speeds"], dense["speeds"], strict=True)]
    assert packed["speedup"] == sum(ratios) / 2  # the median of two
    assert packed["tokens_per_second"] == sum(packed["speeds"]) / 2
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
    job = Job(str(tmp_path / "packed"), **SHORT | {"threads": None}, text=str(text), n_windows=1)
    measurement = Measurement(job)
    assert min(measurement.run()) > 0
    record = measurement.record()
    assert record["n_prompt"] > 4
    assert record["perplexity"] > 1
    assert record["decode_perplexity"] == pytest.approx(record["perplexity"], rel=0.05)
    assert record["megabytes"] > 0


def test_a_process_that_fails_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=f"{tmp_path}: .*Error"):
        bench_models.bench_models([Job(str(tmp_path))])


def test_models_that_would_fill_the_memory_are_opened_one_at_a_time(monkeypatch):
    jobs, open_at_a_time = [Job("preset:llama-tiny", **SHORT)] * 3, []
    record = {"speeds": [1.0], "tokens_per_second": 1.0}
    monkeypatch.setattr(
        bench_models,
        "_take_turns",
        lambda group, _: open_at_a_time.append(len(group)) or [dict(record) for _ in group],
    )
    bench_models.bench_models(jobs)
    monkeypatch.setattr(bench_models, "preset_bytes", lambda *_: 10**15)
    bench_models.bench_models(jobs)
    bench_models.bench_models([Job("preset:llama-tiny", device="cuda")])
    assert open_at_a_time == [3, 1, 1, 1, 1]


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
    monkeypatch.setattr(bench_models, "start", lambda *_, **__: pytest.fail("was started"))
    with pytest.raises(ValueError, match=message):
        check_job(job)
    with pytest.raises(ValueError, match=message):
        bench_models.bench_models([Job("preset:llama-tiny"), job])
