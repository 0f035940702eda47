"""llama.cpp on one GGUF file, asked for the probabilities of the next token: the package `xllamacpp`, CPU only.

    engine = LlamaCpp("model.gguf")
    ids, log_probabilities = engine.next_tokens([5, 6, 7], 100)

The server in the package runs in this process, without its network part.
"""

import os

import torch
from torch import Tensor

HELD_BACK = [["a", 1000.0]]


class LlamaCpp:
    """llama.cpp with one file.

    Args:
        path: of the GGUF file.
        n_context: tokens of the longest prompt.
    """

    def __init__(self, path: str | os.PathLike[str], n_context: int = 128) -> None:
        import xllamacpp  # pyright: ignore[reportMissingImports]

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = n_context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str | list[int], n_new: int = 1, n_best: int = 0) -> dict:
        """The server's answer, with the likeliest tokens of each step.

        A token that is half a letter would be held back with its probabilities, so the letter "a" is chosen instead,
        by a bias that counts in the choice and not in the probabilities.
        """
        request = {"prompt": prompt, "max_tokens": n_new, "temperature": 0, "ignore_eos": True}
        request |= {"logit_bias": HELD_BACK, "logprobs": n_best, "cache_prompt": False}
        return self.server.handle_completions(request)

    def next_tokens(self, prompt: list[int], n_best: int) -> tuple[Tensor, Tensor]:
        """The likeliest next tokens, likeliest first: ids and log-probabilities, each (n_best,)."""
        (choice,) = self.complete(prompt, 1, n_best)["choices"]
        best = choice["logprobs"]["content"][0]["top_logprobs"]
        return torch.tensor([t["id"] for t in best]), torch.tensor([t["logprob"] for t in best])
