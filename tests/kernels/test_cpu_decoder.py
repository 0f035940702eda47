"""A decoder layer in one call of the C library against torch's operators, on every instruction set of this CPU."""

import copy

import pytest
import torch
from cpu_cases import ISAS, bound_layer, needs_library
from random_weights import random_weight
from torch.nn import functional

from vlmq.kernels.decoder import Decoder, Norm, Past, Sizes, Token, decode, why_not

EPS = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}
SIZES = Sizes(n_heads=4, n_kv_heads=2, head_dim=32, scale=0.2)
HIDDEN, INNER, PAST, ROOM = 72, 200, 5, 9
SCHEMES = [
    ("ternary", 64),
    ("ternary", 64),
    ("int4", 32),
    ("int2", None),
    ("int3", 64),
    ("int3", 64),
    ("int4", 128),
]
pytestmark = needs_library


def layers_of(isa=None, dtype=torch.float32, sizes=SIZES):
    queries, keys = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    shapes = [(queries, HIDDEN), (keys, HIDDEN), (keys, HIDDEN), (HIDDEN, queries)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    biases = [torch.randn(out).to(dtype) if i < 3 else None for i, (out, _) in enumerate(shapes)]
    weights = [
        random_weight(name, *shape, group) for (name, group), shape in zip(SCHEMES, shapes, strict=True)
    ]
    for weight in weights:
        weight.scales.mul_(0.02)  # results stay in the range of float16
    return [bound_layer(w, isa, bias) for w, bias in zip(weights, biases, strict=True)]


def norms_of(dtype, of_heads):
    widths = [HIDDEN, HIDDEN, SIZES.head_dim, SIZES.head_dim]
    norms = [Norm((1 + 0.1 * torch.randn(n)).to(dtype), 1e-5 * (i + 1)) for i, n in enumerate(widths)]
    return norms if of_heads else [*norms[:2], None, None]


def call_of(dtype, n_batch, has_turn=True, mask=None):
    """A token, and keys and values as models lay them, heads and tokens swapped, with NaN where nothing is yet."""
    x = torch.randn(n_batch, 1, HIDDEN).to(dtype)
    angle = torch.randn(n_batch, 1, SIZES.head_dim)
    turn = (angle.cos().to(dtype), angle.sin().to(dtype)) if has_turn else None
    room = torch.full((2, n_batch, ROOM, SIZES.n_kv_heads, SIZES.head_dim), torch.nan).to(dtype)
    room[:, :, :PAST] = torch.randn(room[:, :, :PAST].shape).to(dtype)
    keys, values = room.transpose(2, 3)
    return Token(x, turn, mask), Past(keys, values, PAST)


def norm(x, of):
    wide = x.float()
    return of.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + of.eps)).to(x.dtype)


def turned(x, turn):
    a, b = x.chunk(2, -1)
    cos, sin = (t.unsqueeze(1) for t in turn)
    return x * cos + torch.cat((-b, a), -1) * sin


def by_torch(layers, norms, token, past):
    """What a layer must give, and the keys and values behind those of before."""
    x, turn, mask = token
    q, k, v, o, gate, up, down = layers
    sizes = (len(x), 1, -1, SIZES.head_dim)
    h = norm(x, norms[0])
    heads = [layer(h).view(sizes).transpose(1, 2) for layer in (q, k, v)]
    for i in (0, 1):
        heads[i] = heads[i] if norms[2 + i] is None else norm(heads[i], norms[2 + i])
        heads[i] = heads[i] if turn is None else turned(heads[i], turn)
    all_keys, all_values = (
        torch.cat((old[:, :, : past.n_tokens], new), 2).repeat_interleave(2, 1)
        for old, new in ((past.keys, heads[1]), (past.values, heads[2]))
    )
    mixed = functional.scaled_dot_product_attention(
        *(t.float() for t in (heads[0], all_keys, all_values)), attn_mask=mask, scale=SIZES.scale
    )
    h = x + o(mixed.to(x.dtype).transpose(1, 2).reshape(len(x), 1, -1))
    g = norm(h, norms[1])
    return h + down(functional.silu(gate(g)) * up(g)), heads[1], heads[2]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize(
    ("of_heads", "has_turn"), [(False, True), (True, True), (True, False), (False, False)]
)
def test_a_layer_is_what_torch_computes(isa, dtype, n_batch, of_heads, has_turn):
    torch.manual_seed(n_batch)
    layers, norms = layers_of(isa, dtype), norms_of(dtype, of_heads)
    call = call_of(dtype, n_batch, has_turn)
    expected, key, value = by_torch(layers, norms, *call)
    decoder = Decoder(layers, norms, SIZES, dtype, turns=has_turn, isa=isa)
    assert decoder.takes(*call)
    token, past = call
    before = [t[:, :, :PAST].clone() for t in (past.keys, past.values)]
    (out,) = decode([(decoder, past)], token)
    torch.testing.assert_close(out, expected, rtol=EPS[dtype], atol=EPS[dtype] * expected.abs().max().item())
    for cached, new, old in zip((past.keys, past.values), (key, value), before, strict=True):
        torch.testing.assert_close(cached[:, :, PAST], new[:, :, 0], rtol=EPS[dtype], atol=EPS[dtype])
        assert torch.equal(cached[:, :, :PAST], old)
        assert cached[:, :, PAST + 1 :].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_mask_hides_keys_and_one_turn_serves_all_sequences(isa):
    layers, norms = layers_of(isa), norms_of(torch.float32, of_heads=False)
    mask = torch.rand(3, 1, 1, PAST + 1) < 0.5
    mask[..., -1] = True
    for seen in (mask, mask[:1], mask.expand(3, 4, 1, -1).contiguous()):
        (x, turn, _), past = call_of(torch.float32, 3)
        token = Token(x, (turn[0][:1], turn[1][:1]), seen)
        decoder = Decoder(layers, norms, SIZES, torch.float32, isa=isa)
        assert decoder.takes(token, past)
        expected = by_torch(layers, norms, token, past)[0]
        torch.testing.assert_close(decode([(decoder, past)], token)[0], expected, rtol=2e-5, atol=2e-4)


def test_layers_in_one_call_are_those_of_single_calls():
    """One of them turns nothing, and each has keys and values of its own."""
    pairs, apart, token = [], [], call_of(torch.float32, 3)[0]
    for turns in (True, False, True):
        decoder = Decoder(
            layers_of(), norms_of(torch.float32, of_heads=False), SIZES, torch.float32, turns=turns
        )
        past = call_of(torch.float32, 3)[1]
        pairs.append((decoder, past))
        apart.append((decoder, copy.deepcopy(past)))
    x, outs = token.x, decode(pairs, token)
    for out, (decoder, mine), (_, past) in zip(outs, pairs, apart, strict=True):
        (x,) = decode([(decoder, past)], token._replace(x=x))
        assert torch.equal(out, x)
        assert torch.equal(mine.keys[:, :, : PAST + 1], past.keys[:, :, : PAST + 1])
        assert torch.equal(mine.values[:, :, : PAST + 1], past.values[:, :, : PAST + 1])


def test_a_copy_of_keys_and_values_is_read_where_it_lies():
    past = call_of(torch.float32, 2)[1]
    here, other = past.record.keys, copy.deepcopy(past)
    assert other.record.keys == other.keys.data_ptr() != here
    assert other.n_tokens == PAST


@pytest.mark.parametrize("dtype", list(EPS))
def test_what_is_undefined_stays_so_and_touches_no_other_sequence(dtype):
    decoder = Decoder(layers_of(dtype=dtype), norms_of(dtype, of_heads=True), SIZES, dtype)
    token, past = call_of(dtype, 3)
    (whole,) = decode([(decoder, past)], token)
    token.x[1, 0, 3] = torch.nan
    (out,) = decode([(decoder, past)], token)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], whole[::2])


def test_number_of_threads_does_not_change_a_bit():
    decoder = Decoder(layers_of(), norms_of(torch.float32, of_heads=True), SIZES, torch.float32)
    (token, past), results = call_of(torch.float32, 2), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(decode([(decoder, past)], token)[0])
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def keys_and_values(change, n_tokens=PAST):
    """A change of both or one of keys and values."""
    return lambda token, past: (token, Past(*change(past.keys, past.values), n_tokens))


@pytest.mark.parametrize(
    "change",
    [
        lambda token, past: (token._replace(x=token.x.expand(-1, 2, -1)), past),
        lambda token, past: (
            Token(token.x[:1].repeat(17, 1, 1), None, token.mask[:1]),
            Past(*[c[:1].expand(17, -1, -1, -1) for c in (past.keys, past.values)], PAST),
        ),
        lambda token, past: (
            Token(token.x[:0], token.turn, None),
            Past(past.keys[:0], past.values[:0], PAST),
        ),
        lambda token, past: (token._replace(x=token.x[..., :-1]), past),
        lambda token, past: (token._replace(x=token.x.half()), past),
        lambda token, past: (token._replace(x=token.x.repeat(1, 1, 2)[..., ::2]), past),
        lambda token, past: (token._replace(x=token.x.to("meta")), past),
        lambda token, past: (token._replace(turn=tuple(t[..., :-2] for t in token.turn)), past),
        lambda token, past: (token._replace(turn=(token.turn[0], token.turn[1][:1])), past),
        lambda token, past: (token._replace(turn=tuple(t.double() for t in token.turn)), past),
        lambda token, past: (token._replace(turn=None), past),
        lambda token, past: (token._replace(mask=token.mask[..., :-1]), past),
        lambda token, past: (token._replace(mask=token.mask.float()), past),
        keys_and_values(lambda k, v: (k[:1], v)),
        keys_and_values(lambda k, v: (k, v[..., :-16])),
        keys_and_values(lambda k, v: (k, v[..., ::2].repeat(1, 1, 1, 2)[..., ::2])),
        keys_and_values(lambda k, v: (k, v.half())),
        keys_and_values(lambda k, v: (k.to("meta"), v)),
        keys_and_values(lambda k, v: (k[0], v[0])),
        keys_and_values(lambda k, v: (k, v[:, :, :PAST])),
        lambda token, past: (token._replace(mask=None), Past(past.keys, past.values, ROOM)),
        lambda token, past: (token._replace(mask=None), Past(past.keys, past.values, -1)),
    ],
)
def test_all_else_is_left_to_the_layer(change):
    decoder = Decoder(layers_of(), norms_of(torch.float32, of_heads=False), SIZES, torch.float32)
    token, past = call_of(torch.float32, 2, mask=torch.ones(2, 1, 1, PAST + 1, dtype=torch.bool))
    assert decoder.takes(token, past)
    assert not decoder.takes(*change(token, past))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda la, n, s, d: (la[:6], n, s, d), "7 layers"),
        (lambda la, n, s, d: (la, n, s, torch.float64), "float64"),
        (lambda la, n, s, d: (la, n, s._replace(head_dim=8, n_heads=16, n_kv_heads=8), d), "multiple of 16"),
        (lambda la, n, s, d: (la[::-1], n, s, d), "do not fit"),
        (lambda la, n, s, d: (la, n, s._replace(n_heads=3), d), "do not fit"),
        (lambda la, n, s, d: (la, [None, *n[1:]], s, d), "do not fit"),
        (lambda la, n, s, d: (la, [*n[:3], n[0]], s, d), "do not fit"),
        (lambda la, n, s, d: (la, [n[0]._replace(weight=n[0].weight.half()), *n[1:]], s, d), "float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, word):
    parts = layers_of(), norms_of(torch.float32, of_heads=True), SIZES, torch.float32
    assert why_not(*parts) is None
    assert word in str(why_not(*change(*parts)))
    with pytest.raises(ValueError, match=word):
        Decoder(*change(*parts))
