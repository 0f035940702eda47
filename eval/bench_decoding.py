"""What a token and a short prompt take on a CPU outside of the one-token kernels, against torch, in turns.

    python -m vlmq.eval.bench_decoding --threads 1 --json eval/results/decoding.json

One new token in bfloat16: attention (`vlmq.kernels.attention`) and a dense output head (`vlmq.kernels.dense`) against
torch's products, and a packed decoder layer in one call (`vlmq.decoder_step`) against the code of its family, which
calls the same packed layers. And prompts of two lengths through a packed layer of 4096 x 4096, as they are and with
inputs rounded to 8 bits, against torch's bfloat16 layer. Two calls of each in a round, of which the second is timed; a
figure is the median of the rounds.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig

from vlmq.eval.bench_cpu import SIZE
from vlmq.eval.presets import build_random
from vlmq.eval.smollm2 import commit
from vlmq.formats import get_format, n_groups
from vlmq.kernels import cpu
from vlmq.kernels.attention import attend
from vlmq.kernels.dense import dense
from vlmq.kernels.packing import row_bytes

# Heads, heads of keys, size of a head, keys.
ATTENTIONS = ((9, 3, 64, 80), (32, 32, 64, 100), (32, 8, 128, 1000))
# Width, width of the MLP, heads, heads of keys, keys at the start; SmolLM2-135M and the preset llama-2048.
LAYERS = ((576, 1536, 9, 3, 80), (2048, 5632, 32, 32, 80))
LAYER_SCHEMES = ("ternary-g64", "int4-g64")
HEADS = ((49152, 576), (32000, 2048))
SCHEMES = (("ternary", 64), ("int4", 64))
PROMPTS = (64, 256)


def attention_calls(n_heads: int, n_kv: int, dim: int, n_keys: int) -> dict[str, Callable[[], Any]]:
    """One new token, by torch and by vlmq."""
    q = torch.randn(1, 1, n_heads, dim, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(1, n_kv, n_keys, dim, dtype=torch.bfloat16) for _ in range(2))
    name = f"attention, {n_heads} heads of {dim}, {n_kv} of keys, {n_keys} keys"
    return {
        f"{name}: torch": lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        f"{name}: vlmq": lambda: attend(q, k, v, None, dim**-0.5),
    }


def head_calls() -> dict[str, Callable[[], Any]]:
    """One token through dense output heads, by torch and by vlmq."""
    calls: dict[str, Callable[[], Any]] = {}
    for out_features, in_features in HEADS:
        x = torch.randn(1, 1, in_features, dtype=torch.bfloat16)
        weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
        name = f"head, {out_features} x {in_features}"
        calls[f"{name}: torch"] = lambda x=x, weight=weight: functional.linear(x, weight)
        calls[f"{name}: vlmq"] = lambda x=x, weight=weight: dense(x, weight, None)
    return calls


def layer_calls(
    hidden: int, intermediate: int, n_heads: int, n_kv: int, n_keys: int, scheme: str
) -> dict[str, Callable[[], Any]]:
    """One new token through a packed decoder layer of Llama, by its own code and in one call; each has its cache."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        vocab_size=64,
    )
    model: Any = build_random(config, scheme)
    layer = model.model.layers[0]
    x = torch.randn(1, 1, hidden, dtype=torch.bfloat16)
    turn = model.model.rotary_emb(x, torch.tensor([[n_keys]]))
    calls: dict[str, Callable[[], Any]] = {}
    for name, forward in (("own code", partial(type(layer).forward, layer)), ("one call", layer)):
        cache = DynamicCache(config=config)
        model(torch.ones(1, n_keys - 1, dtype=torch.int64), past_key_values=cache)
        model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)  # makes room
        calls[f"layer, {hidden} wide, {scheme}: {name}"] = partial(
            forward, x, attention_mask=None, past_key_values=cache, position_embeddings=turn
        )
    return calls


def prompt_calls() -> dict[str, Callable[[], Any]]:
    """Prompts through one layer, by torch and packed."""
    weight = torch.randn(SIZE, SIZE, dtype=torch.bfloat16)
    inputs = {n_tokens: torch.randn(n_tokens, SIZE, dtype=torch.bfloat16) for n_tokens in PROMPTS}
    calls: dict[str, Callable[[], Any]] = {
        f"{n_tokens} tokens: torch": lambda x=x: functional.linear(x, weight)
        for n_tokens, x in inputs.items()
    }
    for name, group_size in SCHEMES:
        fmt = get_format(name)
        groups = (SIZE, n_groups(SIZE, group_size))
        codes = torch.randint(0, 256, (SIZE, row_bytes(SIZE, fmt.bits)), dtype=torch.uint8)
        zeros = torch.randint(0, 256, groups, dtype=torch.uint8) if fmt.has_zero else None
        parts = (codes, torch.rand(*groups, fmt.n_terms).half(), zeros, None, name, SIZE, group_size)
        for rounds, note in ((False, ""), (True, ", rounded")):
            layer = cpu.bind(*parts, rounds_prompts=rounds)
            for n_tokens, x in inputs.items():
                calls[f"{n_tokens} tokens: {name}-g{group_size}{note}"] = lambda layer=layer, x=x: layer(x)
    return calls


@torch.inference_mode()
def bench_decoding(n_rounds: int = 40) -> dict[str, float]:
    """Milliseconds of each call, by name."""
    groups = [attention_calls(*sizes) for sizes in ATTENTIONS]
    groups += [layer_calls(*sizes, scheme) for sizes in LAYERS for scheme in LAYER_SCHEMES]
    calls = {name: call for group in (*groups, head_calls(), prompt_calls()) for name, call in group.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(n_rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    """Read the arguments, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    found = bench_decoding()
    for name, milliseconds in found.items():
        print(f"{milliseconds:9.3f} ms  {name}")
    if arguments.json is not None:
        record = {"commit": commit(), "threads": arguments.threads, "load": load, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(record | {"milliseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
