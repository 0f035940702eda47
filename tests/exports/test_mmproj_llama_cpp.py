"""llama.cpp itself on both files of an export: after a picture the same probabilities as transformers.

llama.cpp rounds the inputs of packed layers to 8 bits and computes GELU from a table; a grey picture in place of the
picture changes log-probabilities by 0.4 and more, swapped rows by what the last test shows.
"""

import gc
from dataclasses import replace

import pytest
import torch

import vlmq
from vlmq.eval import picture_models
from vlmq.eval.llama_cpp import LlamaCpp
from vlmq.exports import export_model, mmproj_families

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")


def packed(family, scheme="int8-sym-g32"):
    model, processor = picture_models.build(family)
    prompt = picture_models.prompt(family, processor, 0)
    vlmq.quantize(model, [prompt.batch], scheme, solver="rtn")
    return model, processor, prompt


def seen(model, processor, prompt, folder):
    """The hundred likeliest tokens after the picture, and their log-probabilities."""
    export_model(model, "gguf", folder, processor)
    engine = LlamaCpp(folder / "model.gguf", 512, folder / "mmproj-model.gguf")
    ids, found, n_tokens = engine.after_picture(prompt.before, prompt.picture, prompt.after, 100)
    del engine
    gc.collect()
    assert n_tokens == prompt.batch["input_ids"].shape[1]
    return ids, found


@torch.no_grad()
def difference(plain, prompt, ids, found):
    """Largest difference of log-probabilities from those of a model of transformers."""
    expected = plain(**prompt.batch).logits[0, -1].log_softmax(-1)
    return float((found - expected[ids]).abs().max())


@pytest.mark.parametrize("family", [name for name in picture_models.FAMILIES if name != "llava-clip"])
def test_every_family_sees_alike(family, tmp_path):
    model, processor, prompt = packed(family)
    found = seen(model, processor, prompt, tmp_path / "out")
    assert difference(model.dequantize(), prompt, *found) < 0.04


def test_a_class_token_takes_the_place_of_the_first_patch(tmp_path):
    model, processor, prompt = packed("llava-clip")
    found = seen(model, processor, prompt, tmp_path / "out")
    plain = model.dequantize()
    assert difference(plain, prompt, *found) > 0.08

    ids, pixels = prompt.batch["input_ids"], prompt.batch["pixel_values"]
    with torch.no_grad():
        states = plain.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        shown = plain.model.multi_modal_projector(torch.cat([states[:, 2:], states[:, :1]], 1))
        embeddings = plain.get_input_embeddings()(ids)
        embeddings[ids == plain.config.image_token_id] = shown[0]
        expected = plain(inputs_embeds=embeddings).logits[0, -1].log_softmax(-1)
    assert float((found[1] - expected[found[0]]).abs().max()) < 0.04


def test_the_comparison_sees_swapped_rows(tmp_path, monkeypatch):
    family = mmproj_families.FAMILIES["llava"]

    def swapped(model):
        part = family(model)
        pieces = [
            replace(p, rows=torch.arange(64).roll(1)) if p.name.endswith(".attn_v") else p
            for p in part.pieces
        ]
        return replace(part, pieces=tuple(pieces))

    monkeypatch.setitem(mmproj_families.FAMILIES, "llava", swapped)
    model, processor, prompt = packed("llava-siglip")
    found = seen(model, processor, prompt, tmp_path / "out")
    assert difference(model.dequantize(), prompt, *found) > 0.08
