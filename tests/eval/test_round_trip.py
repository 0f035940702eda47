"""The verdict of the round-trip check, with what a fresh process finds made up; the process itself is in test_hub."""

import json
import math
import re

import pytest
import torch
from packed_models import packed
from tiny_models import build
from tiny_processors import build as build_processor

from vlmq import checkpoint
from vlmq.eval import round_trip
from vlmq.eval.probe import answer, make_probe
from vlmq.eval.round_trip import ROUND_TRIP_FILE, check_round_trip, load_snippet, read_round_trip, weights_id


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = packed("llama")
    return model, checkpoint.save(model, tmp_path_factory.mktemp("saved") / "out")


def finding(monkeypatch, change):
    """What the fresh process finds: what the model says, changed."""

    def found(model, folder, probe, trust_remote_code):
        outcome = answer(model, probe)
        return change(
            {"logits": outcome.logits.clone(), "tokens": outcome.tokens.clone(), "buffers": {}}
        ), None

    monkeypatch.setattr(round_trip, "_load_and_answer", found)


def nudged(found, by):
    found["logits"][0, 3, 7] += by
    return found


def test_same_bits_pass(saved, monkeypatch):
    model, folder = saved
    finding(monkeypatch, lambda found: found | {"buffers": round_trip._buffers(model)})
    model.train()
    result = check_round_trip(model, folder)
    assert (result.is_ok, result.is_identical, result.max_difference, result.noise) == (True, True, 0.0, 0.0)
    assert result.is_same_answer
    assert model.training
    assert result == read_round_trip(folder)
    assert result.size["n_bytes_on_disk"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    model.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: nudged(found, 0.5), r"logits differ by up to 0\.(5|499)"),
        (lambda found: nudged(found, math.nan), "logits differ by up to inf"),
        (lambda found: found | {"logits": found["logits"].float()}, "logits differ by up to inf"),
        (lambda found: found | {"tokens": found["tokens"] + 1}, "the generated answer is another one"),
    ],
)
def test_what_differs_fails_and_is_kept(saved, monkeypatch, change, message):
    model, folder = saved
    finding(monkeypatch, change)
    with pytest.raises(
        RuntimeError, match=f"round-trip check of .* failed: .*{message}.*left for inspection"
    ):
        check_round_trip(model, folder)
    kept = json.loads((folder / ROUND_TRIP_FILE).read_text())
    assert not kept["is_ok"]
    assert re.search(message, kept["problem"])


@pytest.mark.parametrize(("by", "passes"), [(0.1, True), (9.0, False)])
def test_difference_is_weighed_against_that_of_two_forwards(saved, monkeypatch, by, passes):
    model, folder = saved
    finding(monkeypatch, lambda found: nudged(found, by))
    true_forward = round_trip.forward_logits
    monkeypatch.setattr(round_trip, "forward_logits", lambda *inputs: true_forward(*inputs) + 0.0625)
    if passes:
        result = check_round_trip(model, folder)
        assert result.is_ok
        assert not result.is_identical
        assert 0 < result.max_difference <= 4 * result.noise
    else:
        with pytest.raises(RuntimeError, match="logits differ"):
            check_round_trip(model, folder)


def test_weights_id_changes_with_the_weights(saved, tmp_path):
    model, folder = saved
    other = packed("llama")
    other.model.norm.weight.data[0] += 1
    checkpoint.save(other, tmp_path / "other")
    assert weights_id(folder) != weights_id(tmp_path / "other")
    checkpoint.save(model, tmp_path / "again")
    assert weights_id(folder) == weights_id(tmp_path / "again")


def test_snippet_names_the_processor_only_where_there_is_one(saved, tmp_path):
    assert load_snippet("me/x", saved[1]).splitlines()[1:] == ["", 'model = vlmq.load("me/x")']
    build_processor("llama").save_pretrained(tmp_path)
    text = load_snippet("me/x", tmp_path, trust_remote_code=True)
    assert 'AutoProcessor.from_pretrained("me/x", trust_remote_code=True)' in text


def test_damaged_record_says_so(tmp_path):
    assert read_round_trip(tmp_path) is None
    (tmp_path / ROUND_TRIP_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is damaged .*delete it"):
        read_round_trip(tmp_path)


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_vl", "gemma3", "paligemma", "idefics3", "clip", "siglip", "llama"]
)
def test_probe_is_made_and_answered_in_every_kind_of_model(family):
    model = build(family)
    outcome = answer(model, make_probe(model, build_processor(family)))
    assert outcome.logits.isfinite().all()
    assert (outcome.tokens is None) == (family in ("clip", "siglip"))


def test_dual_encoder_needs_its_processor():
    with pytest.raises(ValueError, match="needs its processor"):
        make_probe(build("clip"), None)


def test_probe_without_processor_is_token_ids():
    probe = make_probe(build("llava"), None)
    assert torch.equal(probe.inputs["input_ids"], torch.arange(16)[None])
