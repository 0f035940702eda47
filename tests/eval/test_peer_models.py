"""Models that other packages load: names, what is missing, and one of bitsandbytes where that is installed."""

import pytest
import torch

from vlmq.eval import peers
from vlmq.eval.bench_models import Job, Measurement, check_job
from vlmq.eval.peer_models import peer_bits, split_peer
from vlmq.eval.presets import build_preset


def test_names_of_other_models_are_left_alone(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    assert split_peer("bitsandbytes:a/b") == ("bitsandbytes", "a/b")
    assert split_peer("gptqmodel:./c") == ("GPTQModel", "./c")
    assert [split_peer(name)[0] for name in ("a/b", "preset:llama-tiny", "bitsandbytes")] == [None] * 3


def test_missing_package_is_found_before_any_work(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes, not installed: pip install"):
        check_job(Job("bitsandbytes:./x"))


def test_missing_folder_of_a_package_is_found_before_any_work(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="there is no such folder"):
        check_job(Job("gptqmodel:./nowhere"))


def test_bits_are_those_of_all_that_is_stored():
    layer = torch.nn.Linear(64, 8, bias=False)
    layer.weight.quant_state = type("State", (), {"absmax": torch.zeros(8), "code": torch.zeros(16)})()
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 2, bias=False))
    stored = 4 * (64 * 8 + 8 + 16)
    assert peer_bits(model) == (8 * stored / (64 * 8), stored + 4 * 8 * 2)


def test_bitsandbytes_generates_on_the_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    # Its CPU kernel refuses widths that are not multiples of 64, as most tiny models have.
    build_preset("llama-tiny").save_pretrained(tmp_path)
    measured = Measurement(Job(f"bitsandbytes:{tmp_path}", threads=1, n_new=3, n_prompt=4))
    assert min(measured.run()) > 0
    assert 4 < measured.record()["bits_per_weight"] < 6
