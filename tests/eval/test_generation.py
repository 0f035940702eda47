"""Speed of generation: what is timed, and what is counted."""

import pytest
import tiny_models
import torch

from vlmq.eval import generation
from vlmq.eval.generation import held_bytes, measure_speed, peak_bytes


@pytest.fixture
def model():
    return tiny_models.build("llama").eval()


def prompt(n_tokens=5, rows=1):
    return {"input_ids": torch.ones(rows, n_tokens, dtype=torch.int64)}


def test_every_run_makes_all_its_tokens_and_the_first_is_not_counted(model, monkeypatch):
    seconds = iter([(9.0, 9.0), (1.0, 0.5), (3.0, 0.25), (2.0, 1.0)])
    monkeypatch.setattr(generation, "generate_once", lambda *_: (*next(seconds), []))
    speed = measure_speed(model, prompt(), n_new=5, n_runs=3)
    assert speed.first_token == 2.0
    assert (speed.tokens_per_second, speed.slowest, speed.fastest) == (8.0, 4.0, 16.0)
    assert (speed.n_prompt, speed.n_new) == (5, 5)


def test_the_clock_sees_each_new_token(model):
    n_steps = 0
    handle = model.register_forward_pre_hook(lambda *_: count())

    def count():
        nonlocal n_steps
        n_steps += 1

    speed = measure_speed(model, prompt(), n_new=4, n_runs=2)
    handle.remove()
    assert n_steps == 3 * 4
    assert 0 < speed.slowest <= speed.tokens_per_second <= speed.fastest


def test_an_end_token_does_not_shorten_a_run(model):
    with torch.no_grad():
        token = int(model(**prompt()).logits[0, -1].argmax())
    model.generation_config.eos_token_id = token
    assert measure_speed(model, prompt(), n_new=6, n_runs=1).n_new == 6


@pytest.mark.parametrize(
    ("inputs", "n_new", "n_runs"), [(prompt(rows=2), 4, 1), (prompt(), 1, 1), (prompt(), 4, 0)]
)
def test_counts_that_measure_nothing_are_refused(model, inputs, n_new, n_runs):
    with pytest.raises(ValueError, match="expected one prompt"):
        measure_speed(model, inputs, n_new=n_new, n_runs=n_runs)


def test_memory_counts_what_is_held():
    cpu = torch.device("cpu")
    before = held_bytes(cpu)
    tensor = torch.ones(2**24)
    assert held_bytes(cpu) - before > 0.9 * 2**26
    assert peak_bytes(cpu) >= held_bytes(cpu) - 2**20
    del tensor
