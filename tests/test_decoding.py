"""Generation with attention in C and a cache that grows in place gives what transformers' own gives."""

import copy
import json
import sys

import pytest
import torch
from installed import needs_transformers
from packed_models import packed
from tiny_models import build
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlmq import decoding
from vlmq.decoding import prepare_decoding
from vlmq.decoding_attention import NAME, attention
from vlmq.growing_cache import GrowingLayer
from vlmq.kernels import attention as kernel
from vlmq.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.missing_library() is not None, reason="needs the C kernels")
IDS = torch.arange(3, 40).reshape(1, -1)


@pytest.fixture(scope="module")
def model():
    """In full precision, so that a difference is that of the attention: packed layers round their inputs."""
    model = build("llama").float()
    prepare_decoding(model)
    return model


@pytest.fixture
def n_keys(monkeypatch):
    """Number of keys of each call of the kernel."""
    seen, attend = [], kernel.attend

    def count(q, k, *args):
        seen.append(k.shape[-2])
        return attend(q, k, *args)

    monkeypatch.setattr(kernel, "attend", count)
    return seen


def plain(model):
    """The same model as transformers alone would run it."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    other._forward_pre_hooks.clear()
    return other


def generate(model, ids, **kwargs):
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options | kwargs)
    return out.sequences, torch.stack(out.logits)


def test_generation_is_that_of_transformers(model, n_keys):
    tokens, logits = generate(model, IDS)
    assert n_keys == [n for n in range(38, 38 + 19) for _ in range(2)]
    n_keys.clear()
    expected, expected_logits = generate(plain(model), IDS)
    assert n_keys == []
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_padded_rows_see_no_padding(model, n_keys):
    ids = torch.cat([IDS, IDS.flip(1)])
    ids[1, :9] = 0
    mask = (ids != 0).long()
    tokens, logits = generate(model, ids, attention_mask=mask)
    assert n_keys
    expected, expected_logits = generate(plain(model), ids, attention_mask=mask)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_are_those_of_transformers(model, options):
    assert torch.equal(generate(model, IDS, **options)[0], generate(plain(model), IDS, **options)[0])


def test_a_loaded_model_is_prepared_and_its_config_says_nothing_of_it(tmp_path):
    model = packed("llama", ("int4-g32",))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == NAME
    assert NAME not in {
        v for v in json.loads((tmp_path / "config.json").read_text()).values() if isinstance(v, str)
    }
    assert torch.equal(generate(loaded, IDS)[1], generate(model, IDS)[1])


def test_parts_of_a_vision_language_model_are_prepared():
    model = packed("llava", ("int4-g32",))
    assert model.config.text_config._attn_implementation == NAME
    assert len(model._forward_pre_hooks) == 1
    prepare_decoding(model)
    assert len(model._forward_pre_hooks) == 1


def test_what_somebody_chose_is_kept(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    prepare_decoding(other)
    assert other.config._attn_implementation == "eager"


def test_families_that_ask_for_the_name_keep_it():
    import transformers.models.falcon.modeling_falcon as falcon
    import transformers.models.llama.modeling_llama as llama
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as qwen

    assert decoding._asks_for_sdpa(falcon.__name__)
    assert not decoding._asks_for_sdpa(llama.__name__)
    assert not decoding._asks_for_sdpa(qwen.__name__)  # it is a default there
    assert decoding._asks_for_sdpa("a module that is not there")
    assert falcon.__name__ in sys.modules


def test_without_the_library_nothing_changes(model, monkeypatch):
    other = plain(model)
    monkeypatch.setattr(decoding, "missing_library", lambda: "not built")
    prepare_decoding(other)
    assert other.config._attn_implementation == "sdpa"
    assert not other._forward_pre_hooks


def states(n_tokens, dim=16):
    return torch.randn(2, 4, n_tokens, dim)


@pytest.mark.parametrize("more", [{"position_bias": torch.randn(1, 4, 1, 9)}, {"dropout": 0.5}])
def test_arguments_that_change_the_result_go_to_sdpa(more, n_keys):
    q, k, v = states(1), states(9), states(9)
    torch.manual_seed(0)
    out, _ = attention(torch.nn.Identity(), q, k, v, None, **more)
    torch.manual_seed(0)
    assert torch.equal(out, sdpa_attention_forward(torch.nn.Identity(), q, k, v, None, **more)[0])
    assert n_keys == []


def test_gradients_pass(n_keys):
    q, k, v = states(1).requires_grad_(), states(9), states(9)
    attention(torch.nn.Identity(), q, k, v, None)[0].sum().backward()
    assert q.grad.abs().sum() > 0
    assert n_keys == []


def grown(layer, pieces):
    return [layer.update(piece, -piece) for piece in pieces]


def test_a_growing_layer_gives_what_a_dynamic_one_gives():
    pieces = [states(n) for n in (5, 1, 1, 200, 1, 3)]
    mine, theirs = GrowingLayer(), DynamicLayer()
    results = grown(mine, pieces)
    for (k, v), (k2, v2) in zip(results, grown(theirs, pieces), strict=True):
        assert torch.equal(k, k2)  # also those returned before: nothing that was shown changes
        assert torch.equal(v, v2)
    assert mine.get_seq_length() == 211


def test_tokens_are_not_copied_while_there_is_room():
    layer = GrowingLayer()
    grown(layer, [states(5), states(1)])
    place = layer.keys.data_ptr()
    grown(layer, [states(1)] * 100)
    assert layer.keys.data_ptr() == place


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        pytest.param(
            lambda layer: layer.reset(),
            marks=needs_transformers("5.18", "writes zeros into the tensors that it resets"),
        ),
    ],
)
def test_a_growing_layer_follows_what_is_done_to_it(change):
    mine, theirs, pieces = GrowingLayer(), DynamicLayer(), [states(5), states(1), states(2)]
    for layer in (mine, theirs):
        grown(layer, pieces)
    before = mine.keys
    kept = before.clone()
    for layer in (mine, theirs):
        change(layer)
        size = len(layer.keys) if layer.is_initialized else 2
        layer.update(*[pieces[1][:1].expand(size, -1, -1, -1)] * 2)
        layer.update(*[pieces[2][:1].expand(size, -1, -1, -1)] * 2)
    assert torch.equal(mine.keys, theirs.keys)
    assert torch.equal(mine.values, theirs.values)
    assert torch.equal(before, kept)


def test_copies_of_a_layer_grow_apart():
    layer = GrowingLayer()
    grown(layer, [states(5), states(1)])
    other = copy.deepcopy(layer)
    grown(layer, [torch.zeros(2, 4, 1, 16)])
    grown(other, [torch.ones(2, 4, 1, 16)])
    assert layer.keys[..., -1, :].eq(0).all()
    assert other.keys[..., -1, :].eq(1).all()


def test_a_layer_goes_on_after_inference_mode():
    layer = GrowingLayer()
    with torch.inference_mode():
        grown(layer, [states(5), states(1)])
    with torch.no_grad():
        assert grown(layer, [states(1)])[0][0].shape[-2] == 7


def test_a_layer_that_needs_gradients_is_put_together_anew():
    layer, new = GrowingLayer(), states(1).requires_grad_()
    grown(layer, [states(5), states(1)])
    grown(layer, [new])[0][0].sum().backward()
    assert new.grad.eq(1).all()


def test_a_cache_that_was_begun_elsewhere_grows_in_place_from_here(model):
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        plain(model)(IDS, past_key_values=cache)
        assert all(type(layer) is DynamicLayer for layer in cache.layers)
        more = model(IDS[:, :1], past_key_values=cache).logits
        assert all(type(layer) is GrowingLayer for layer in cache.layers)
        whole = plain(model)(torch.cat([IDS, IDS[:, :1]], 1)).logits
    assert cache.get_seq_length() == 38
    torch.testing.assert_close(
        more[:, -1], whole[:, -1], rtol=2e-2, atol=2e-2
    )  # activations of 8 bits, or not
