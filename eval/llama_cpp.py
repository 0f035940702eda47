"""llama.cpp on one GGUF file, asked for the probabilities of the next token: the package `xllamacpp`, CPU only.

    engine = LlamaCpp("model.gguf")
    ids, log_probabilities = engine.next_tokens([5, 6, 7], 100)

    engine = LlamaCpp("model.gguf", pictures="mmproj-model.gguf")
    ids, log_probabilities = engine.after_picture("What is this:", image, "It is", 100)

The server in the package runs in this process, without its network part.
"""

import base64
import io
import os

import torch
from PIL import Image
from torch import Tensor

HELD_BACK = [["a", 1000.0]]
AS_IT_IS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


class LlamaCpp:
    """llama.cpp with one file.

    Args:
        path: of the GGUF file.
        n_context: tokens of the longest prompt.
        pictures: path of the file with the vision part, None for text only.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_context: int = 128,
        pictures: str | os.PathLike[str] | None = None,
    ) -> None:
        import xllamacpp  # pyright: ignore[reportMissingImports]

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = n_context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.verbosity = -1
        if pictures is not None:
            params.mmproj.path = str(pictures)
            params.mmproj_use_gpu = False
            params.use_jinja = True
            params.chat_template = AS_IT_IS
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
        return _best(self.complete(prompt, 1, n_best))

    def after_picture(
        self, before: str, picture: Image.Image, after: str, n_best: int
    ) -> tuple[Tensor, Tensor, int]:
        """The likeliest tokens after a picture between two texts.

        Returns:
            ids and log-probabilities, each (n_best,), and the number of tokens of the prompt.
        """
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [
            {"type": "text", "text": before},
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": after},
        ]
        request = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
        request |= {"logprobs": True, "top_logprobs": n_best, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_chat_completions(request | {"logit_bias": HELD_BACK})
        return *_best(answer), answer["usage"]["prompt_tokens"]


def _best(answer: dict) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the first step of an answer; RuntimeError with the server's words for none."""
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp expected another request: {answer.get('error', answer)}")
    best = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return torch.tensor([t["id"] for t in best]), torch.tensor([t["logprob"] for t in best])
