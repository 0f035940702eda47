"""Walks of models that mix features between blocks, run blocks several times, or share state between them."""

import pytest
import tiny_models
import torch
import transformers as hf
from walk_oracle import all_names, assert_exact, assert_same_calls, make_batches, plain_inputs

from vlmq.calib.tokens import TEXT, CalibBatch
from vlmq.calib.walk import walk_blocks
from vlmq.families import describe


def text_batches(vocab_size: int, n_batches: int = 2, **extra: torch.Tensor) -> list[CalibBatch]:
    ids = [torch.randint(3, vocab_size, (2, 9)) for _ in range(n_batches)]
    return [CalibBatch({"input_ids": i, **extra}, torch.full(i.shape, TEXT, dtype=torch.int8)) for i in ids]


@pytest.mark.parametrize("parts", [None, {"vision", "language"}, {"language"}, {"vision"}, {"projector"}])
def test_deepstack_from_several_depths(parts):
    config = tiny_models.FAMILIES["qwen3_vl"]()
    config.text_config.num_hidden_layers = config.vision_config.depth = 4
    config.vision_config.deepstack_visual_indexes = [0, 2]
    assert_exact(
        tiny_models.from_config(hf.AutoModelForImageTextToText, config), make_batches("qwen3_vl"), parts
    )


@pytest.mark.parametrize("layer", [-2, [0, 2, -1]])
@pytest.mark.parametrize("parts", [None, {"language"}])
def test_features_of_inner_vision_blocks(layer, parts):
    config = tiny_models.FAMILIES["llava"]()
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 4
    config.vision_feature_layer = layer
    model = tiny_models.from_config(hf.AutoModelForImageTextToText, config)
    assert_exact(model, make_batches("llava"), parts)


def test_layers_that_share_keys_and_values():
    shared = {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": 200,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 16,
    }
    config = hf.Gemma4TextConfig(**{**tiny_models.TEXT, **shared})
    assert_exact(tiny_models.from_config(hf.AutoModelForCausalLM, config), make_batches("llama"))


def test_encoder_decoder():
    config = hf.T5Config(d_model=32, d_ff=48, d_kv=16, num_layers=3, num_heads=2, vocab_size=50)
    model = tiny_models.from_config(hf.AutoModelForSeq2SeqLM, config)
    batches = text_batches(50, decoder_input_ids=torch.randint(3, 50, (2, 5)))
    assert_exact(model, batches)


def test_plain_encoder():
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    assert_exact(tiny_models.from_config(hf.AutoModel, config), text_batches(50))


def test_cross_attention_blocks_between_the_others():
    text = {**tiny_models.TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_global_layers": 1}
    vision |= {
        "attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 1],
    }
    vision |= {"vision_output_dim": 96, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    config = hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=199)
    model = tiny_models.from_config(hf.AutoModelForImageTextToText, config)
    batches = []
    for batch in make_batches("llava"):
        inputs = {
            "input_ids": batch.inputs["input_ids"],
            "attention_mask": batch.inputs["attention_mask"],
            "pixel_values": batch.inputs["pixel_values"][:, None, None],
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, 12, 1, 1, dtype=torch.long),
        }
        batches.append(CalibBatch(inputs, batch.kinds))
    assert_exact(model, batches)


def test_a_block_that_runs_several_times_gives_one_call_for_each():
    config = hf.AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=50,
    )
    model, batches = tiny_models.from_config(hf.AutoModel, config), text_batches(50)
    (name,) = all_names(model)
    plain = plain_inputs(model, [name], batches)
    (block,) = walk_blocks(model, describe(model), batches)
    assert block.batch_indices == [0, 0, 0, 1, 1, 1]
    assert_same_calls(block.inputs, plain[name], name)


def test_images_and_videos_in_one_batch_run_the_tower_twice():
    model = tiny_models.build("qwen2_5_vl")
    batches = make_batches("qwen2_5_vl")
    for batch in batches:
        ids = batch.inputs["input_ids"]
        ids[:, 8:12] = tiny_models.QWEN_TOKENS["video_token_id"]
        batch.inputs["mm_token_type_ids"][:, 8:12] = 2
        batch.inputs["pixel_values_videos"] = torch.randn_like(batch.inputs["pixel_values"])
        batch.inputs["video_grid_thw"] = batch.inputs["image_grid_thw"].clone()
    image_only = make_batches("qwen2_5_vl", 1)
    mixed = [*batches, *image_only]
    for block in walk_blocks(model, describe(model), mixed):
        assert block.batch_indices == ([0, 0, 1, 1, 2] if block.spec.part == "vision" else [0, 1, 2])
    assert_exact(model, mixed)


def test_what_model_and_blocks_write_in_place_leaves_the_stored_tensors_alone():
    class Writing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(x)
            x += y
            return x

    class Model(hf.PreTrainedModel):
        config_class = hf.PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.layers = torch.nn.ModuleList(Writing() for _ in range(4))
            self.post_init()

        def forward(self, x):
            skip = self.layers[0](x * 1)
            skip *= 0.5
            x = self.layers[2](self.layers[1](skip * 1))
            x += 1
            return self.layers[3](x + skip)

    model = Model(hf.PreTrainedConfig()).eval()
    batches = [CalibBatch({"x": torch.randn(2, 5, 8)}, torch.full((2, 5), TEXT, dtype=torch.int8))] * 2
    assert_exact(model, batches)
