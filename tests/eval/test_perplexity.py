import math

import pytest
import torch
from tiny_models import build
from tiny_processors import tokenizer

from vlmq.eval.perplexity import perplexity, token_windows


def ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 190, (rows, length), generator=torch.Generator().manual_seed(0))


def test_perplexity_equals_the_models_own_loss():
    model = build("llama")
    tokens = ids()
    loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in tokens]).mean().item()
    assert perplexity(model, tokens) == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch_size():
    model = build("llama")
    assert perplexity(model, ids(), batch_size=1) == pytest.approx(perplexity(model, ids(), batch_size=2))


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_perplexity_through_the_cache_is_the_same(chunk):
    model = build("llama")
    whole = perplexity(model, ids())
    assert perplexity(model, ids(), batch_size=1, chunk=chunk) == pytest.approx(whole, rel=1e-4)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    model = build("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert perplexity(model, ids()) == pytest.approx(200, rel=1e-5)


def test_perplexity_scores_half_precision_logits_in_float32():
    half = build("llama", dtype=torch.bfloat16)
    logits = half(input_ids=ids()).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten())
    assert perplexity(half, ids()) == pytest.approx(math.exp(nll.item()), rel=1e-5)


def test_perplexity_runs_a_vision_language_model_on_text():
    assert math.isfinite(perplexity(build("llava"), ids()))


def test_perplexity_that_overflows_is_infinite():
    model = build("llama")
    model.get_output_embeddings().weight.data.mul_(1e5)
    assert perplexity(model, ids()) == math.inf


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.long), "length >= 2"),
        (torch.zeros(2, 1, dtype=torch.long), "length >= 2"),
        (torch.full((1, 4), 200), "expected 0 to 199, got 200 to 200"),
    ],
)
def test_perplexity_refuses_bad_token_ids(tokens, message):
    with pytest.raises(ValueError, match=message):
        perplexity(build("llama"), tokens)


def test_token_windows_cut_from_the_beginning():
    words = tokenizer()
    text = "a quick brown fox " * 5
    windows = token_windows(text, words, length=8)
    whole = words(text, add_special_tokens=False)["input_ids"]
    assert windows.flatten().tolist() == whole[: windows.numel()]
    assert len(whole) - windows.numel() < 8
    assert token_windows(text, words, length=8, n_windows=2).shape == (2, 8)


def test_token_windows_refuse_a_short_text():
    with pytest.raises(ValueError, match="too few for 1 windows of 512"):
        token_windows("short", tokenizer())
