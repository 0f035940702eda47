"""Packed embeddings and heads: the vectors of the packed rows, one matrix for both where tied, saved and reloaded."""

import copy

import pytest
import tiny_models
import torch
from packed_models import auto_class, logits, read_tensors
from torch import nn

import vlmq
from vlmq.embedding import QuantEmbedding, find_embedding, round_rows
from vlmq.eval.size import model_size
from vlmq.linear import QuantLinear
from vlmq.scheme import parse_scheme

SCALED = ("gemma3", "paligemma")
FAMILIES = [family for family in tiny_models.FAMILIES if family not in (*SCALED, "clip")]
TIED = ("internvl", "mistral3")


def pack(model, scheme="int8-g64"):
    found = find_embedding(model)
    vlmq.quantization.pack_embeddings(model, scheme)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_saves_and_reloads_with_the_same_logits(family, tmp_path):
    model = tiny_models.build(family, torch.bfloat16)
    before = logits(model, family)
    found = pack(model)
    after = logits(model, family)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert (after - before).float().norm() < 0.1 * before.float().norm()
    assert model.dtype == torch.bfloat16
    assert found.is_tied == (family in TIED)
    vlmq.save(model, tmp_path / "packed")
    for reloaded in (vlmq.load(tmp_path / "packed"), auto_class(family).from_pretrained(tmp_path / "packed")):
        assert torch.equal(logits(reloaded, family), after)
        assert reloaded.dtype == torch.bfloat16


def test_a_tied_matrix_is_stored_once_and_serves_both(tmp_path):
    model = tiny_models.build("internvl", torch.bfloat16)
    n_tokens, width = model.get_input_embeddings().weight.shape
    pack(model, "int4-g16")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert embedding.rows is head
    vlmq.save(model, tmp_path / "packed")
    large = [n for n, t in read_tensors(tmp_path / "packed").items() if t.shape == (n_tokens, width // 2)]
    assert [name.rpartition(".")[2] for name in large] == ["qweight"]
    reloaded = vlmq.load(tmp_path / "packed")
    assert reloaded.get_input_embeddings().rows is reloaded.get_output_embeddings()
    again = copy.deepcopy(reloaded)
    assert again.get_input_embeddings().rows is again.get_output_embeddings()


@pytest.mark.parametrize("scheme", ["int8-g64", "int4-g16", "int2-channel", "ternary-g32", "binary2-g16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_a_lookup_gives_the_rows_of_the_packed_matrix(scheme, shape):
    scheme = parse_scheme(scheme)
    weight = torch.randn(11, 40, generator=torch.Generator().manual_seed(1))
    rows = QuantLinear.from_quantized(round_rows(weight, scheme), dtype=torch.bfloat16)
    embedding = QuantEmbedding(rows, is_own=True, dtype=torch.bfloat16)
    ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(2))
    out = embedding(ids)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, nn.functional.embedding(ids, embedding.weight))


def test_int8_rows_are_near_the_weights():
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_rows(weight, parse_scheme("int8-g64")).dequantize()
    assert (rounded - weight).norm() < 0.006 * weight.norm()


def test_a_cast_changes_the_vectors_dtype_and_not_the_packed_values():
    rows = QuantLinear.from_quantized(round_rows(torch.randn(7, 32), parse_scheme("int8-g32")))
    embedding = QuantEmbedding(rows, is_own=True, dtype=torch.float32)
    before = rows.scales.clone()
    embedding.half()
    assert embedding(torch.tensor([1])).dtype == torch.float16
    assert rows.scales.dtype == torch.float16
    assert torch.equal(rows.scales, before)


@pytest.mark.parametrize("family", ["internvl", "llama"])
def test_a_packed_model_can_be_dequantized(family, monkeypatch):
    monkeypatch.setenv("VLMQ_BACKEND", "reference")  # the CPU kernels round the inputs of few tokens
    model = tiny_models.build(family)
    pack(model)
    before = logits(model, family)
    model.dequantize()
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in model.modules())
    assert torch.allclose(logits(model, family), before, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "internvl", "llama"])
def test_quantize_packs_the_embeddings_last_and_reports_them(family, tmp_path):
    model, batches = tiny_models.build(family, torch.bfloat16), tiny_models.inputs(family, 2)
    plain = vlmq.quantize(tiny_models.build(family, torch.bfloat16), batches, "int4-g16")
    plan = vlmq.plan(model, "int4-g16", embeddings="int8-g64")
    rows = {row["part"]: row for row in plan.rows()}
    assert rows["embedding"]["n_layers"] == (1 if family in TIED else 2)
    vlmq.quantize(model, batches, "int4-g16", embeddings="int8-g64")
    states = model.state_dict(), plain.state_dict()
    in_blocks = [name for name in states[1] if "layers" in name]
    assert all(torch.equal(states[0][name], states[1][name]) for name in in_blocks)
    assert {n for n, m in model.named_modules() if isinstance(m, QuantLinear)} == plan.schemes.keys()
    size = model_size(model)
    assert size.quantized_bits == sum(plan.bits.values())
    assert size.total_bits == 8 * plan.n_bytes_after
    vlmq.save(model, tmp_path / "packed")
    assert torch.equal(logits(vlmq.load(tmp_path / "packed"), family), logits(model, family))


def test_embeddings_of_a_packed_model_are_packed_as_quantize_does(tmp_path):
    batches = tiny_models.inputs("internvl", 2)
    at_once = vlmq.quantize(tiny_models.build("internvl"), batches, "int4-g16", embeddings="int8-g64")
    later = vlmq.quantize(tiny_models.build("internvl"), batches, "int4-g16")
    vlmq.save(later, tmp_path / "packed")
    later = vlmq.quantization.pack_embeddings(vlmq.load(tmp_path / "packed"))
    states = at_once.state_dict(), later.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with pytest.raises(ValueError, match="found QuantEmbedding"):
        vlmq.quantization.pack_embeddings(later)


def test_a_refused_embedding_is_found_before_any_work():
    model = tiny_models.build("gemma3")
    with pytest.raises(ValueError, match="ScaledWordEmbedding"):
        vlmq.quantize(model, tiny_models.inputs("gemma3", 1), "int4-g16", embeddings="int8-g64")
    with pytest.raises(ValueError, match="embeddings"):
        vlmq.plan(tiny_models.build("llama"), embeddings="int9")


@pytest.mark.parametrize(("family", "found"), [("gemma3", "ScaledWordEmbedding"), ("clip", "found none")])
def test_embeddings_that_do_more_than_look_up_are_refused(family, found):
    with pytest.raises(ValueError, match=found):
        find_embedding(tiny_models.build(family))


def test_a_config_that_names_no_embedding_is_refused(tmp_path):
    model = tiny_models.build("llama", torch.bfloat16)
    pack(model)
    vlmq.save(model, tmp_path / "packed")
    path = tmp_path / "packed/config.json"
    path.write_text(path.read_text().replace('"model.embed_tokens": ', '"model.nothing": '))
    with pytest.raises(ValueError, match="no linear layer model.embed_tokens.table"):
        vlmq.load(tmp_path / "packed")
