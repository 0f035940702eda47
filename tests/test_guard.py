"""A checkpoint opened without `import vlmq`: an error, never random weights; and nothing of it with vlmq."""

import subprocess
import sys

import pytest
import torch
from packed_models import auto_class, logits, packed, read_tensors
from safetensors.torch import save_file
from test_checkpoint import set_config, store_as_version_2

import vlmq
from vlmq.guard import LAYER_SHAPE, NOTE, find_guards


def open_without_vlmq(folder, auto="AutoModelForCausalLM"):
    """Load in a fresh process that never sees vlmq."""
    code = f"from transformers import {auto}; {auto}.from_pretrained({str(folder)!r}); print('LOADED')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path):
    return vlmq.save(packed("llama", ("int4-g32", "ternary-g16")), tmp_path / "model")


def test_transformers_by_itself_refuses_the_checkpoint(folder):
    result = open_without_vlmq(folder)
    assert result.returncode != 0
    assert "LOADED" not in result.stdout
    assert "RuntimeError" in result.stderr
    assert NOTE in result.stderr


def test_a_tower_by_itself_is_refused_too(tmp_path):
    vlmq.save(packed("clip", ("int4-g16",)), tmp_path / "model")
    result = open_without_vlmq(tmp_path / "model", "CLIPVisionModel")
    assert result.returncode != 0
    assert "LOADED" not in result.stdout


@pytest.mark.parametrize("family", ["llama", "llava", "qwen3_vl_moe"])
def test_with_vlmq_guards_are_dropped_without_a_word(family, tmp_path, caplog):
    model = packed(family, ("int4-g32",))
    model.save_pretrained(tmp_path / "model")
    n_layers = len(model.config.quantization_config.schemes())
    files = [str(path) for path in (tmp_path / "model").glob("*.safetensors")]
    assert len(find_guards(files)) == n_layers + 1
    loaded = auto_class(family).from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert "UNEXPECTED" not in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    assert read_tensors(tmp_path / "again").keys() == read_tensors(tmp_path / "model").keys()


def test_version_1_without_guards_still_loads(folder):
    store_as_version_2(folder, vlmq.load(folder))
    tensors = read_tensors(folder)
    kept = {name: t for name, t in tensors.items() if tuple(t.shape) not in ((1,), LAYER_SHAPE)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, format_version=1)
    assert vlmq.load(folder).config.quantization_config.format_version == 1


def test_a_weight_that_is_no_guard_is_refused(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = read_tensors(folder) | {name: torch.zeros(64, 64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"hold tensors that no format has: {name}"):
        vlmq.load(folder)
