"""Ready batches that hold videos: the tower sees their frames, as the model's own forward gives them."""

from typing import Any

import pytest
import tiny_models
import torch
from walk_oracle import assert_exact

import vlmq
from vlmq.calib.batches import as_batches
from vlmq.calib.tokens import IMAGE
from vlmq.linear import QuantLinear

N_FRAMES, N_PATCHES = 2, 16


def video_batch(family: str, rows: int = 2) -> dict[str, Any]:
    """Rows of 18 tokens with one video; Qwen3 and later put a start and an end around each frame."""
    tokens, generator = tiny_models.QWEN_TOKENS, torch.Generator().manual_seed(5)
    ids = torch.randint(3, 190, (rows, 18), generator=generator)
    frame = [tokens["video_token_id"]] * 4
    between = [195, tokens["vision_start_token_id"]] if family.startswith("qwen3") else []
    video = [tokens["vision_start_token_id"], *frame, *between, *frame]
    ids[:, 2 : 2 + len(video)] = torch.tensor(video)
    patch = 14 if family in ("qwen2_vl", "qwen2_5_vl") else 16
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(
            rows * N_FRAMES * N_PATCHES, 3 * 2 * patch**2, generator=generator
        ),
        "video_grid_thw": torch.tensor([[N_FRAMES, 4, 4]] * rows),
        "mm_token_type_ids": 2 * (ids == tokens["video_token_id"]).long(),
    }


@pytest.mark.parametrize("family", tiny_models.QWEN_FAMILIES)
def test_blocks_get_what_the_forward_gives_them(family):
    model = tiny_models.build(family)
    batches = as_batches([video_batch(family), tiny_models.inputs(family, 1)[0]], model)
    assert [int((batch.kinds == IMAGE).sum()) for batch in batches] == [16, 4]
    assert_exact(model, batches)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_model_is_quantized_on_videos_and_saved(family, tmp_path):
    model, batch = tiny_models.build(family), video_batch(family)
    data = vlmq.calib.load([batch], None)
    with torch.no_grad():
        before = model(**batch).logits
        vlmq.quantize(model, data, "int4-g16", saliency="modality")
        after = model(**batch).logits
    assert 0 < (after - before).norm() < 0.05 * before.norm()
    layers = {n: m.report for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {r.n_tokens for n, r in layers.items() if "visual" in n and r} == {2 * N_FRAMES * N_PATCHES}
    vlmq.save(model, tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(vlmq.load(tmp_path / "packed")(**batch).logits, after)


def test_videos_for_a_model_that_takes_none_are_an_error():
    with pytest.raises(ValueError, match="holds videos, but LlamaForCausalLM takes no pixel_values_videos"):
        as_batches([video_batch("qwen2_vl")], tiny_models.build("llama"))
