"""Every command on checkpoints of other formats: vlmq's own layers run them, whatever packages are installed."""

import json
import sys

import pytest
import torch
from gguf_models import byte_level, packed_text
from packed_models import logits
from test_imports import write

import vlmq
from vlmq import cli
from vlmq.eval import bench_models
from vlmq.exports import export_model
from vlmq.hf import VlmqQuantizer
from vlmq.linear import QuantLinear
from vlmq.opening import open_empty, open_model

METHODS = ("compressed-tensors", "gptq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model in two formats, with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("foreign")
    model = packed_text("llama", ("int4-sym-g32",))
    for method in METHODS:
        export_model(model, method, folder / method, byte_level())
    (folder / "text.txt").write_text("The red circle is in the image. " * 8)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["vlmq", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_foreign_checkpoint_is_opened_by_the_importer(method, tmp_path):
    write(tmp_path, method)
    model = open_model(str(tmp_path))
    assert isinstance(model.hf_quantizer, VlmqQuantizer)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), QuantLinear)
    assert torch.equal(logits(model, "llama"), logits(vlmq.load(tmp_path), "llama"))


@pytest.mark.parametrize("method", METHODS)
def test_inspect_and_eval_take_foreign_checkpoints(method, run):
    code, out, err = run("inspect", method, "--layers", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["metadata"] == {"imported_from": method}
    assert len(found["layers"]) == 14
    code, out, err = run(
        "eval", method, "--text", "text.txt", "--length", "16", "--reference", method, "--json"
    )
    assert code == 0, err
    first, second = json.loads(out)["evaluation"]
    assert first["perplexity"] == second["perplexity"] > 1


@pytest.mark.parametrize(("method", "to"), [("gptq", "compressed-tensors"), ("compressed-tensors", "gguf")])
def test_export_goes_from_format_to_format(method, to, run, tmp_path):
    code, out, err = run("export", method, "--to", to, "--out", str(tmp_path / "out"), "--json")
    assert code == 0, err
    assert sum(json.loads(out)["layers"].values()) == 14


def test_bench_opens_foreign_checkpoints_packed(folder):
    model, processor = bench_models._open(bench_models.Job(str(folder / "gptq")))
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    assert processor is not None


def test_a_plan_of_a_foreign_checkpoint_is_refused_with_the_road(folder, run):
    with pytest.raises(ValueError, match=r"packed already \(gptq\).*vlmq.load.*vlmq.save"):
        open_empty(str(folder / "gptq"))
    code, _, err = run("quantize", "gptq", "out", "--dry-run")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_what_was_imported_and_saved_is_planned_as_packed(folder, tmp_path):
    vlmq.save(vlmq.load(folder / "gptq"), tmp_path / "own")
    layer = open_empty(str(tmp_path / "own")).get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantLinear)
