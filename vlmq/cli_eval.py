"""The command `vlmq eval`: quality of a model, beside the original."""

from pathlib import Path
from typing import Annotated

import typer

from vlmq import terminal
from vlmq.eval.dual_encoder import TEMPLATE_SETS, read_templates
from vlmq.eval.evaluation import evaluate
from vlmq.eval.labeled import load_captioned, load_labeled
from vlmq.eval.perplexity import token_windows
from vlmq.eval.vqa import load_rows
from vlmq.opening import check_device, open_model, open_processor

TEMPLATES = ", ".join(TEMPLATE_SETS)


def eval_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model, packed or not.")],
    text: Annotated[Path | None, typer.Option(help="A text file, for perplexity.")] = None,
    vqa: Annotated[Path | None, typer.Option(help="A .jsonl of image, question, answer.")] = None,
    zero_shot: Annotated[
        str | None, typer.Option(help="Images with labels: class folders, a .jsonl, or a set of the hub.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help=f"Text with {{}} for the class, or a set: {TEMPLATES}. Repeatable."),
    ] = None,
    retrieval: Annotated[
        str | None, typer.Option(help="Images with captions: a .jsonl, or a set of the hub.")
    ] = None,
    n_images: Annotated[
        int | None, typer.Option(help="Images with labels or captions; all unless told.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The original model, to compare with.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window of text.")] = 512,
    n_windows: Annotated[int | None, typer.Option(help="Windows of text; all unless told.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward.")] = 8,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cuda:1; the CPU unless told.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a model on what is given, beside the original if --reference names it."""
    if text is None and vqa is None and zero_shot is None and retrieval is None:
        raise ValueError("nothing to measure: give --text FILE, --vqa FILE.jsonl, --zero-shot or --retrieval")
    check_device(device)
    templates = read_templates(template or ["photo"])
    labeled = None if zero_shot is None else load_labeled(zero_shot, n_images=n_images)
    captioned = None if retrieval is None else load_captioned(retrieval, n_images=n_images)
    ids, rows = None, None if vqa is None else load_rows(vqa)
    written = None if text is None else text.read_text()
    with terminal.working("loading"):
        processor = open_processor(model, trust_remote_code=trust_remote_code)
        tokenizer = getattr(processor, "tokenizer", processor)
        if written is not None:
            ids = token_windows(written, tokenizer, length=length, n_windows=n_windows)
        loaded = open_model(model, device=device, trust_remote_code=trust_remote_code)
        original = None
        if reference is not None:
            original = open_model(reference, device=device, trust_remote_code=trust_remote_code)
    with terminal.working("measuring"):
        table = evaluate(
            loaded,
            processor,
            token_ids=ids,
            rows=rows,
            labeled=labeled,
            templates=templates,
            captioned=captioned,
            original=original,
            batch_size=batch_size,
        )
    terminal.show({"evaluation": table}, json)
