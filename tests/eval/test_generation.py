"""Speed of generation: what is timed, and what is counted."""

import pytest
import tiny_models
import torch

from vlmq.eval.generation import generate_once, held_bytes, peak_bytes


@pytest.fixture
def model():
    return tiny_models.build("llama").eval()


def prompt(n_tokens=5, rows=1):
    return {"input_ids": torch.ones(rows, n_tokens, dtype=torch.int64)}


def test_the_clock_sees_each_new_token(model):
    n_steps = 0
    handle = model.register_forward_pre_hook(lambda *_: count())

    def count():
        nonlocal n_steps
        n_steps += 1

    first, decode, tokens = generate_once(model, prompt(), 4)
    handle.remove()
    assert n_steps == 4
    assert min(first, decode) > 0
    expected = model.generate(**prompt(), do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert tokens == expected[0, 5:].tolist()


def test_an_end_token_does_not_shorten_a_run(model):
    with torch.no_grad():
        token = int(model(**prompt()).logits[0, -1].argmax())
    model.generation_config.eos_token_id = token
    assert len(generate_once(model, prompt(), 6)[2]) == 6


def test_memory_counts_what_is_held():
    cpu = torch.device("cpu")
    before = held_bytes(cpu)
    tensor = torch.ones(2**24)
    assert held_bytes(cpu) - before > 0.9 * 2**26
    assert peak_bytes(cpu) >= held_bytes(cpu) - 2**20
    del tensor
