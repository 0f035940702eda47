"""`vlmq export` on a tiny packed model, as a user runs it."""

import copy
import json
import sys

import pytest
import transformers as hf
from gguf_models import byte_level, packed_text, read_file
from packed_models import packed
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vlmq
from vlmq import cli
from vlmq.exports import gguf_file


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `vlmq export` in a folder that holds a packed model; returns the exit code, stdout and stderr."""
    vlmq.save(packed("llama", ("int4-sym-g32",)), tmp_path / "packed")

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["vlmq", "export", "packed", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_export_writes_a_folder_and_says_what(run, tmp_path):
    code, out, _ = run("--to", "compressed-tensors", "--out", "there")
    assert code == 0
    assert "every value is as it was" in out
    assert (tmp_path / "there" / "model.safetensors").is_file()
    block = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"


def test_json_is_one_object(run):
    code, out, _ = run("--to", "compressed-tensors", "--out", "there", "--json")
    report = json.loads(out)
    assert code == 0
    assert sum(report["layers"].values()) == 14
    assert report["relative_error"] is None


def test_gguf_takes_the_tokenizer_of_the_folder(run, tmp_path):
    vlmq.save(packed_text("llama", ("int4-g64",)), tmp_path / "packed", byte_level())
    code, out, _ = run("--to", "gguf", "--out", "there", "--convert", "Q4_1", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["layers"] == {"Q4_1, 5.0 bits": 14}
    assert 0 < report["relative_error"] < 1e-3
    assert read_file(tmp_path / "there" / "model.gguf")[2]["tokenizer.ggml.pre"] == "gpt-2"


def test_the_text_part_alone_is_an_option(run, tmp_path):
    words = copy.deepcopy(byte_level())
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = hf.LlavaProcessor(CLIPImageProcessorPil(), words, patch_size=14)
    vlmq.save(packed_text("llava"), tmp_path / "packed", processor)
    assert run("--to", "gguf", "--out", "both")[0] == 0
    assert run("--to", "gguf", "--out", "text", "--text-only")[0] == 0
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("both", "text")]
    assert names == [["mmproj-model.gguf", "model.gguf"], ["model.gguf"]]
    code, _, err = run("--to", "gptq", "--out", "there", "--text-only")
    assert (code, "holds the whole model" in err) == (2, True)


def test_gguf_without_its_package_is_refused_before_work(run, monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    code, _, err = run("--to", "gguf", "--out", "there")
    assert code == 2
    assert "needs the package gguf: pip install gguf" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf", "--out", "there"), "a GGUF file holds the tokenizer"),
        (("--to", "gguf", "--out", "there", "--convert", "Q3_1"), "--convert: format 'Q3_1'"),
        (("--to", "onnx", "--out", "there"), "export to 'onnx' is unknown; known: compressed-tensors"),
        (("--to", "bitnet", "--out", "there"), "round every input to 8 bits"),
        (("--to", "compressed-tensors", "--out", "packed"), "is the model itself"),
        (("--to", "compressed-tensors", "--out", "there", "--convert", "int5"), "--convert: format 'int5'"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
