"""Attention of one new token in C against float64, on every instruction set of this CPU."""

import pytest
import torch
from cpu_cases import ISAS, needs_library

from vlmq.kernels.attention import attend, takes

EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
pytestmark = needs_library


def exact(q, k, v, mask, scale):
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def tokens(*sizes, dtype=torch.float32, room=0):
    """(n_batch, n_heads, n_tokens, dim) as models make them: heads and tokens swapped, with room at the end."""
    n_batch, n_heads, n_tokens, dim = sizes
    whole = torch.full((n_batch, n_tokens + room, n_heads, dim), torch.nan).to(dtype)
    whole[:, :n_tokens] = torch.randn(n_batch, n_tokens, n_heads, dim).to(dtype)
    return whole.transpose(1, 2)[:, :, :n_tokens]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("n_keys", [1, 2, 5, 15, 16, 17, 63, 200])
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "dim", "value_dim"), [(4, 4, 64, 64), (6, 2, 16, 80), (4, 2, 32, 48), (7, 1, 112, 32)]
)
def test_attention_is_the_softmax_of_the_products(isa, dtype, n_keys, n_heads, n_kv, dim, value_dim):
    torch.manual_seed(n_keys)
    q, k = tokens(2, n_heads, 1, dim, dtype=dtype), tokens(2, n_kv, n_keys, dim, dtype=dtype, room=3)
    v = tokens(2, n_kv, n_keys, value_dim, dtype=dtype, room=5)
    mask = torch.rand(2, 1, 1, n_keys) < 0.7
    mask[..., -1] = True
    for seen in (None, mask, mask[:1], mask.expand(2, n_heads, 1, n_keys)):
        assert takes(q, k, v, seen)
        out = attend(q, k, v, seen, 0.3, isa=isa)
        assert out.shape == (2, 1, n_heads, value_dim)
        torch.testing.assert_close(out.double(), exact(q, k, v, seen, 0.3), rtol=EPS[dtype], atol=EPS[dtype])


@pytest.mark.parametrize("isa", ISAS)
def test_large_products_do_not_overflow(isa):
    q, k, v = tokens(1, 1, 1, 16), tokens(1, 1, 40, 16), tokens(1, 1, 40, 16)
    for factor in (1e3, 1e15):
        out = attend(q * factor, k, v, None, 1.0, isa=isa)
        torch.testing.assert_close(out, exact(q * factor, k, v, None, 1.0).float())


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_undefined_stays_so_and_touches_nothing_else(isa):
    q, k, v = tokens(2, 2, 1, 16), tokens(2, 2, 9, 16), tokens(2, 2, 9, 16)
    whole = attend(q, k, v, None, 1.0, isa=isa)
    k[1, 0, 4, 3] = torch.nan
    out = attend(q, k, v, None, 1.0, isa=isa)
    assert out[1, 0, 0].isnan().all()
    assert torch.equal(out[0], whole[0])
    assert torch.equal(out[1, 0, 1], whole[1, 0, 1])


@pytest.mark.parametrize("isa", ISAS)
def test_a_masked_key_counts_nothing_whatever_it_holds(isa):
    q, k, v = tokens(1, 2, 1, 16), tokens(1, 2, 9, 16), tokens(1, 2, 9, 16)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 2] = False
    out = attend(q, k, v, mask, 1.0, isa=isa)
    k[..., 2, :] = torch.nan
    assert torch.equal(attend(q, k, v, mask, 1.0, isa=isa), out)
    assert torch.equal(attend(q, k, v, torch.zeros_like(mask), 1.0, isa=isa), torch.zeros_like(out))


def test_number_of_threads_does_not_change_a_bit():
    q, k, v = tokens(2, 8, 1, 64), tokens(2, 4, 700, 64), tokens(2, 4, 700, 64)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(attend(q, k, v, None, 0.125))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q.expand(-1, -1, 2, -1), k, v, m),
        lambda q, k, v, m: (q.double(), k.double(), v.double(), m),
        lambda q, k, v, m: (q, k.half(), v.half(), m),
        lambda q, k, v, m: (q, k[..., :-1, :], v, m),
        lambda q, k, v, m: (q, k[:1], v[:1], m),
        lambda q, k, v, m: (q[:, :3], k, v, m),
        lambda q, k, v, m: (q[..., :24], k[..., :24], v, m),
        lambda q, k, v, m: (q, k, v[..., :24], m),
        lambda q, k, v, m: (q, k[..., ::2].repeat(1, 1, 1, 2)[..., ::2], v, m),
        lambda q, k, v, m: (q, k[:, :, :0], v[:, :, :0], None),
        lambda q, k, v, m: (q, k, v, m.float()),
        lambda q, k, v, m: (q, k, v, m[0]),
        lambda q, k, v, m: (q, k, v, m[..., :-1]),
        lambda q, k, v, m: (q.to("meta"), k.to("meta"), v.to("meta"), None),
    ],
)
def test_all_else_is_left_to_torch(change):
    q, k, v = tokens(2, 4, 1, 32), tokens(2, 2, 9, 32), tokens(2, 2, 9, 32)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert takes(q, k, v, mask)
    assert not takes(*change(q, k, v, mask))
