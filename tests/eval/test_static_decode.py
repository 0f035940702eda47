"""Decoding with a static cache: the tokens of `generate`, one graph, and no read of the host in a step."""

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmq.eval.presets import build_preset
from vlmq.eval.static_decode import StaticDecoder, capture, decode

N_PROMPT, N_NEW = 9, 12
READS_BACK = {"item", "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero"}
"""Operators that hand a value or a size to the host, which a capture refuses."""


def prompt(device="cpu"):
    return torch.randint(512, (1, N_PROMPT), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture(params=[None, "ternary-channel"])
def decoder(request):
    with torch.inference_mode():
        yield StaticDecoder(
            build_preset("llama-tiny", request.param, dtype=torch.float32), N_PROMPT + N_NEW + 3
        )


def test_tokens_are_those_of_generate(decoder):
    ids = prompt()
    options = {"do_sample": False, "max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "pad_token_id": 0}
    expected = decoder.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for _ in range(2):  # the second prompt finds the cache of the first
        got = decode(decoder, decoder.step, ids, N_NEW, clock=time.perf_counter)
        assert got.tokens == expected[0, N_PROMPT:].tolist()


def test_step_compiles_into_one_graph(decoder):
    expected = decode(decoder, decoder.step, prompt(), N_NEW, clock=time.perf_counter)
    compiled = decoder.compiled("aot_eager")
    assert decode(decoder, compiled, prompt(), N_NEW, clock=time.perf_counter).tokens == expected.tokens


class Calls(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_step_reads_nothing_back_to_the_host(decoder):
    decoder.prefill(prompt())
    with Calls() as calls:
        decoder.step()
    assert "index_copy_" in calls.names
    assert calls.names & READS_BACK == set()
    with calls:
        decoder.token.item()
    assert calls.names & READS_BACK


@pytest.mark.parametrize("n_new", [1, N_NEW + 4])
def test_impossible_lengths_are_refused(decoder, n_new):
    with pytest.raises(ValueError, match=f"expected 2 to {N_NEW + 3} new tokens, got {n_new}"):
        decode(decoder, decoder.step, prompt(), n_new, clock=time.perf_counter)
    with pytest.raises(ValueError, match=r"tokens of prompt, got 40"):
        decoder.prefill(torch.zeros(1, 40, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", [None, "int4-g128", "ternary-channel"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_captured_step_gives_the_same_tokens(scheme, is_compiled):
    def clock():
        torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        decoder = StaticDecoder(build_preset("llama-tiny", scheme, device="cuda"), N_PROMPT + N_NEW + 3)
        ids = prompt("cuda")
        expected = decode(decoder, decoder.step, ids, N_NEW, clock=clock)
        step = capture(decoder.compiled() if is_compiled else decoder.step)
        for _ in range(2):
            assert decode(decoder, step, ids, N_NEW, clock=clock).tokens == expected.tokens
