"""The command `vlmq export`: a packed model in the format of another engine."""

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import cached_file

from vlmq import checkpoint, terminal
from vlmq.exports import TARGETS, check_convert, check_export, export_model
from vlmq.opening import open_processor

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def export_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a packed model.")],
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(TARGETS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    convert: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Round layers that the format cannot say to this scheme, such as int4-sym-g128, or for gguf as "
            "Q4_1, and measure the error; without it they are refused.",
        ),
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave the vision part out; gguf only.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
    ] = False,
) -> None:
    """Write a packed model in the format of another engine: the same values, or a refusal."""
    check_export(to, text_only=text_only)
    if convert is not None:
        check_convert(to, convert, where="--convert")
    checkpoint.check_target(out)
    if out.resolve() == Path(model).resolve():
        raise ValueError(
            f"--out is the model itself ({model}), which would be replaced; choose another folder"
        )
    with terminal.working("loading"):
        loaded = checkpoint.load(model, trust_remote_code=trust_remote_code)
        processor = _processor(model, trust_remote_code)
    with terminal.working(f"exporting to {to}"):
        written = export_model(loaded, to, out, processor, convert=convert, text_only=text_only)
    content: dict[str, Any] = {
        "to": to,
        "folder": str(written.folder),
        "layers": written.layers,
        "n_converted": written.n_converted,
        "relative_error": written.error,
        "notes": list(written.notes),
    }
    lines = [f"{n} layers: {how}" for how, n in written.layers.items()]
    if written.error is not None:
        lines.append(
            f"{written.n_converted} layers were rounded to {convert}: relative error {written.error:.4f}"
        )
    else:
        lines.append("every value is as it was")
    lines += [f"note: {note}" for note in written.notes]
    terminal.show(content, json, lines=[*lines, f"wrote {written.folder}"])


def _processor(model: str, trust_remote_code: bool) -> Any:
    """The processor, None if the checkpoint has none."""
    found = (
        cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES
    )
    return open_processor(model, trust_remote_code=trust_remote_code) if any(found) else None
