"""Dense layers of few tokens in C against float64, on every instruction set of this CPU."""

import pytest
import torch
from cpu_cases import ISAS, needs_library

from vlmq.kernels.dense import dense, takes

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
pytestmark = needs_library


def layer(out_features, in_features, dtype, n_tokens=1):
    x, weight = torch.randn(n_tokens, in_features), torch.randn(out_features, in_features) / in_features**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(out_features).to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("n_tokens", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (4, 16), (7, 130), (66, 576), (1030, 96)])
def test_a_layer_is_the_product(isa, dtype, n_tokens, shape):
    torch.manual_seed(shape[0])
    x, weight, bias = layer(*shape, dtype, n_tokens)
    for b in (bias, None):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert takes(x, weight, b)
        out = dense(x, weight, b, isa=isa)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=EPS[dtype], atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_neither_threads_nor_tokens_beside_change_a_bit(isa):
    x, weight, bias = layer(4001, 300, torch.bfloat16, 4)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(dense(x, weight, bias, isa=isa))
    torch.set_num_threads(1)
    results.append(torch.cat([dense(row[None], weight, bias, isa=isa) for row in x]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_dimensions_before_the_last_are_kept_and_nan_stays_in_its_token():
    x, weight, bias = layer(8, 40, torch.bfloat16, 4)
    whole = dense(x, weight, bias)
    assert torch.equal(dense(x.view(2, 1, 2, 40), weight, bias), whole.view(2, 1, 2, 8))
    x[1, 3] = torch.nan
    out = dense(x, weight, bias)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.repeat(5, 1), w, b),
        lambda x, w, b: (x[:0], w, b),
        lambda x, w, b: (x.float(), w.float(), b.float()),
        lambda x, w, b: (x.half(), w, b),
        lambda x, w, b: (x[:, :-1], w, b),
        lambda x, w, b: (x, w[:, ::2].repeat(1, 2)[:, ::1].T.contiguous().T, b),
        lambda x, w, b: (x, w, b[:-1]),
        lambda x, w, b: (x, w, b.half()),
        lambda x, w, b: (x, w[:0], b[:0]),
        lambda x, w, b: (x, w.flatten(), b),
        lambda x, w, b: (x.to("meta"), w.to("meta"), b.to("meta")),
    ],
)
def test_all_else_is_left_to_torch(change):
    parts = layer(8, 40, torch.bfloat16)
    assert takes(*parts)
    assert not takes(*change(*parts))
