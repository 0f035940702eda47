"""Train the small CLIP that ships with vlmq on scenes cut from the train split of easy-vqa.

Each step draws new scenes (`scenes.py`) with one true caption each, and some captions that are false of their scene but
close: the two things change places. Of any caption it is known of which scenes it is true, so the contrastive loss has
all true pairs as targets in place of the diagonal,

    L = - mean_i sum_j T_ij log softmax_j(s_ij)  - mean_j sum_i T'_ij log softmax_i(s_ij)

T the table of true pairs with its rows, T' with its columns scaled to sum 1.

    python -m vlmq.eval.train_clip --out my-clip

needs the `easy-vqa` package; it took 56 minutes on a core that others used too.
`--minutes 3` stops after three minutes; the same command goes on from there, to the same result.
"""

import argparse
import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPModel, CLIPProcessor

from vlmq.eval.clip_card import write_card
from vlmq.eval.clip_model import build_model, build_processor
from vlmq.eval.scenes import (
    COLORS,
    KINDS,
    OPENINGS,
    RELATIONS,
    SIDES,
    Claim,
    Scene,
    Thing,
    compose,
    random_claim,
)
from vlmq.eval.scenes_data import load_pictures

logger = logging.getLogger(__name__)

N_STEPS = 3000
N_WARMUP_STEPS = 100
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.1
STATE_FILE = "training_state.pt"


def all_words() -> list[str]:
    """Sentences that hold every word of every caption."""
    nouns = [f"a small {color} {kind}" for color in COLORS.values() for kind in KINDS] + ["a large and"]
    return [o + nouns[0] for o in OPENINGS] + nouns + list(SIDES.values()) + list(RELATIONS.values())


def draw(
    scenes: list[Scene], things: list[Thing], generator: random.Random, n_scenes: int
) -> tuple[list[Scene], list[Claim]]:
    """Scenes, a true claim of each, and after these the false ones.

    Three in ten scenes are pictures as they are, three hold one thing, four hold two.
    """
    chosen: list[Scene] = []
    for _ in range(n_scenes):
        kind = generator.random()
        if kind < 0.3:
            chosen.append(generator.choice(scenes))
        else:
            chosen.append(compose(generator.sample(things, 1 if kind < 0.6 else 2), generator))
    claims = [random_claim(scene, generator) for scene in chosen]
    swapped = [Claim(c.second, c.first, c.relation) for c in claims if c.second is not None and c.relation]
    return chosen, claims + swapped


def targets(scenes: list[Scene], claims: list[Claim]) -> Tensor:
    """(n_scenes, n_claims) float32, 1 where the claim is true of the scene."""
    return torch.tensor([[float(claim.holds(scene)) for claim in claims] for scene in scenes])


def contrastive_loss(scores: Tensor, truth: Tensor) -> Tensor:
    """The loss of the module; claims that are true of no scene count as negatives only."""
    by_scene = truth / truth.sum(dim=1, keepdim=True)
    columns = truth[:, truth.sum(dim=0) > 0]
    by_claim = (columns / columns.sum(dim=0)).T
    claims = scores[:, truth.sum(dim=0) > 0].T
    return F.cross_entropy(scores, by_scene) + F.cross_entropy(claims, by_claim)


def train_step(
    model: CLIPModel,
    processor: CLIPProcessor,
    data: tuple[list[Scene], list[Thing]],
    generator: random.Random,
) -> Tensor:
    """The loss of new scenes, with its graph."""
    scenes, claims = draw(*data, generator, BATCH_SIZE)
    texts = [claim.text(generator.choice(OPENINGS)) for claim in claims]
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.stack([torch.from_numpy(s.pixels.copy()) for s in scenes]).permute(0, 3, 1, 2)
    # The fused attention of the CPU backend is slower here: its backward takes half of the whole step.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        outputs = model(pixel_values=pixels.float() / 127.5 - 1.0, **tokens)
    image, text = (F.normalize(e.float(), dim=-1) for e in (outputs.image_embeds, outputs.text_embeds))
    return contrastive_loss(model.logit_scale.exp() * image @ text.T, targets(scenes, claims))


def train(out: Path, *, seed: int, minutes: float) -> bool:
    """Train until done or out of time; returns whether it is done, with the model in float32 saved in `out`."""
    pictures = load_pictures("train")
    data = [p.scene for p in pictures], [p.thing for p in pictures if not p.thing.is_cut]
    processor = build_processor(all_words())
    model = build_model(processor, seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    first, seconds = 0, 0.0
    if (out / STATE_FILE).exists():
        state: dict[str, Any] = torch.load(out / STATE_FILE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started = time.monotonic()
    step, running = first, 0.0
    while step < N_STEPS and time.monotonic() - started < 60 * minutes:
        rate = LEARNING_RATE * min(
            0.5 * (1 + math.cos(math.pi * step / N_STEPS)), (step + 1) / N_WARMUP_STEPS
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = train_step(model, processor, data, random.Random(seed * N_STEPS + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        running += float(loss.detach())
        step += 1
        if step % 25 == 0:
            logger.info("step %d/%d loss %.4f", step, N_STEPS, running / min(25, step - first))
            running = 0.0
    seconds += time.monotonic() - started
    out.mkdir(parents=True, exist_ok=True)
    if step < N_STEPS:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "seconds": seconds}, out / STATE_FILE)
        logger.info("stopped at step %d of %d; the same command goes on", step, N_STEPS)
        return False
    model.eval().bfloat16().save_pretrained(out)
    processor.save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"training_seconds": round(seconds), "seed": seed}))
    (out / STATE_FILE).unlink(missing_ok=True)
    return True


def main() -> None:
    """Train, then measure the saved model and write its card."""
    parser = argparse.ArgumentParser(description="Train the small CLIP that ships with vlmq.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, to go on later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    is_done = (arguments.out / "training.json").exists()
    if is_done or train(arguments.out, seed=arguments.seed, minutes=arguments.minutes):
        write_card(arguments.out)


if __name__ == "__main__":
    main()
