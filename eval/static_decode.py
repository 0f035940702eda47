"""Greedy decoding of one prompt with a static cache, as a step that can be captured in a CUDA graph.

`generate` of transformers compiles its forward pass for a static cache, but stops at the host for each token: a
millisecond or more, as long as a quantized model of seven billion weights takes. Here the step reads and writes fixed
addresses only, the chosen token and its position among them, so that a token costs one graph launch:

    logits = model(token, position, cache);  token = argmax logits;  tokens[position + 1] = token;  position += 1

The step may be compiled first (`compiled`), which fuses what stands between the layers, then captured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

Step = Callable[[], object]
"""One token; what it returns is not read."""

WARM_UP = 3


class StaticDecoder:
    """The state of one prompt; `prefill`, then `step` once for each further token."""

    def __init__(self, model: PreTrainedModel, n_positions: int) -> None:
        """Make room for `n_positions` tokens, the prompt among them."""
        self.model = model
        self.n_positions = n_positions
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=n_positions)
        self.tokens = torch.zeros(1, n_positions, dtype=torch.long, device=model.device)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def prefill(self, ids: Tensor) -> Tensor:
        """Read a prompt (1, n_prompt) and choose the token after it, (1, 1), which is not on the host yet.

        Raises:
            ValueError: there is no room for the prompt and one more token.
        """
        n_prompt = ids.shape[1]
        if not 0 < n_prompt < self.n_positions:
            raise ValueError(f"expected 1 to {self.n_positions - 1} tokens of prompt, got {n_prompt}")
        self.cache.reset()
        positions = torch.arange(n_prompt, device=ids.device)[None]
        self.tokens.zero_()
        self.tokens[:, :n_prompt] = ids
        self.position.fill_(n_prompt)
        self._choose(ids, positions)
        return self.token

    def step(self) -> None:
        """Read the last token and choose the next one."""
        self._choose(self.token, self.position)
        self.position.add_(1)

    def compiled(self, backend: str = "inductor") -> Step:
        """The step in one compiled graph; for after a `prefill`, which makes the cache."""
        return torch.compile(self.step, fullgraph=True, dynamic=False, backend=backend)

    def _choose(self, ids: Tensor, positions: Tensor) -> None:
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token.copy_(out.logits.argmax(-1))
        self.tokens.index_copy_(1, positions[0, -1:] + 1, self.token)


@dataclass(frozen=True)
class Decoded:
    """Tokens that were generated, the first of them by the prefill, and the seconds of all but the first."""

    tokens: list[int]
    seconds: float


def capture(step: Step) -> Step:
    """Capture a step in a CUDA graph, after warming up; returns its replay. The state moves on by WARM_UP tokens."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decode(
    decoder: StaticDecoder, step: Step, ids: Tensor, n_new: int, *, clock: Callable[[], float]
) -> Decoded:
    """Generate n_new tokens after the prompt, the first by the prefill, the others by the step.

    Args:
        clock: seconds, once the device has done what it was given.

    Raises:
        ValueError: fewer than two new tokens, or more than there is room for.
    """
    n_prompt = ids.shape[1]
    if not 2 <= n_new <= decoder.n_positions - n_prompt:
        raise ValueError(f"expected 2 to {decoder.n_positions - n_prompt} new tokens, got {n_new}")
    decoder.prefill(ids)
    started = clock()
    for _ in range(n_new - 1):
        step()
    seconds = clock() - started
    return Decoded(cast(list[int], decoder.tokens[0, n_prompt : n_prompt + n_new].tolist()), seconds)
