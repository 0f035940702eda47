"""The command `vlmq quantize`: quantize, save, check the round trip, measure, write the card, push where asked to."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import PreTrainedModel

from vlmq import checkpoint, hub, terminal
from vlmq.calib.data import load
from vlmq.calib.saliency import SALIENCIES, read_options
from vlmq.card import keep_evaluation, write_card
from vlmq.cli_show import show_model, show_plan
from vlmq.eval.evaluation import evaluate
from vlmq.eval.perplexity import token_windows
from vlmq.eval.report import Table
from vlmq.eval.round_trip import RoundTrip, check_round_trip
from vlmq.eval.summary import layer_table, part_table
from vlmq.eval.vqa import VqaRow, load_rows
from vlmq.opening import check_device, open_empty, open_model, open_processor
from vlmq.options import parse_options
from vlmq.overrides import PRESETS
from vlmq.planning import Plan, plan
from vlmq.quantization import DEFAULT_ALPHA, DEFAULT_SALIENCY, check_alpha, quantize
from vlmq.resuming import check_folder
from vlmq.scheme import Scheme
from vlmq.staging import check_space

TOKEN_WEIGHTS = ", ".join(SALIENCIES)
KEPT = "the same command goes on after the blocks that are finished in {}"
NOT_KEPT = (
    "nothing is kept; with --checkpoint-dir DIR the same command goes on after the blocks that are finished"
)


def quantize_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed model.")],
    scheme: Annotated[str, typer.Option(help="Format and group size.")] = "int4-g128",
    calib: Annotated[
        str | None, typer.Option(help="Calibration data: a folder of images, a .jsonl, or a known set.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="A recipe such as gptq+cd; the format's best.")] = None,
    saliency: Annotated[str, typer.Option(help=f"Weights of tokens: {TOKEN_WEIGHTS}.")] = DEFAULT_SALIENCY,
    saliency_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="Of the saliency, such as temperature=0.5. Repeatable."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of the asymmetric target, 0 to 1.")] = DEFAULT_ALPHA,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME", help="Part, half or pattern; none keeps it. Or Q-FFN. Repeatable."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="Of the solver, such as damp=0.05. Repeatable."),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Scheme of token embedding and output head, such as int8-g64.")
    ] = None,
    n_samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Where a calibration row is cut.")] = 2048,
    seed: Annotated[
        int, typer.Option(help="The same seed on the same machine gives the same packed bytes.")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cuda:1; the CPU unless told.")] = None,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Go on from here if interrupted.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file: perplexity before and after.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window of that text.")] = 512,
    vqa: Annotated[
        Path | None, typer.Option(help="A .jsonl of image, question, answer: accuracy before and after.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload OUT with a model card to this repository, such as me/name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Quantize MODEL, save it packed into OUT, and check that it answers the same when loaded in a fresh process."""
    saliency_options = parse_options(saliency_option or [], flag="--saliency-option")
    check_alpha(alpha)
    read_options(saliency, saliency_options)
    check_device(device)
    if private and push is None:
        raise ValueError("--private says how to push: give --push REPOSITORY too, or leave it out")
    how = {
        "solver": solver,
        "overrides": parse_overrides(override or []),
        "options": parse_options(option or []),
        "embeddings": embeddings,
    }
    check_folders(out, model, checkpoint_dir)
    with terminal.working("planning"):
        steps = plan(open_empty(model, trust_remote_code=trust_remote_code), scheme, **how)
    if dry_run:
        show_plan(steps, json)
        return
    how |= {"saliency": saliency, "saliency_options": saliency_options}
    how |= {"alpha": alpha, "checkpoint_dir": checkpoint_dir}
    job = Job(model, out, scheme, how, seed, device, trust_remote_code)
    measures = Measures.read(text, length, vqa)
    push = None if push is None else hub.check_access(push, private=private)
    loaded, result = job.run(calib, n_samples, max_tokens, steps, measures)
    tables = {"parts": part_table(loaded)} | ({"layers": layer_table(loaded)} if json else {})
    figures: dict[str, Any] = {"round_trip": vars(result)}
    if measures.table is not None:
        tables["evaluation"] = measures.table
    if push is not None:
        with terminal.working(f"uploading to {push}"):
            figures["pushed"] = hub.push(out, push, private=private, trust_remote_code=trust_remote_code)
    show_model(loaded, out, json, tables=tables, figures=figures)


@dataclass
class Measures:
    """What is measured before and after; `table` is what came out, None where nothing was asked for."""

    text: str | None
    length: int
    rows: list[dict[str, Any]] | None
    described: str
    table: Table | None = None
    _ids: Tensor | None = None

    @classmethod
    def read(cls, text: Path | None, length: int, vqa: Path | None) -> "Measures":
        """Read the files before any work starts."""
        rows = None if vqa is None else load_rows(vqa)
        written = None if text is None else text.read_text()
        parts = []
        if text is not None:
            parts.append(f"windows of {length} tokens of {_named(text)} (perplexity)")
        if vqa is not None and rows is not None:
            parts.append(f"{len(rows)} questions of {_named(vqa)} (accuracy)")
        return cls(written, length, rows, " and ".join(parts))

    def tokenize(self, processor: Any) -> None:
        """Cut the text by the model's tokenizer; it may be too short, which is found before work starts."""
        if self.text is not None:
            tokenizer = getattr(processor, "tokenizer", processor)
            self._ids = token_windows(self.text, tokenizer, length=self.length)
            self.described = f"{len(self._ids)} {self.described}"

    def measure(self, model: PreTrainedModel, processor: Any, name: str) -> None:
        """Add a row for a model."""
        if self.text is None and self.rows is None:
            return
        found = evaluate(model, processor, token_ids=self._ids, rows=self.rows)
        rows = self.table.rows if self.table else ()
        self.table = Table("Evaluation", found.columns, (*rows, (name, *found.rows[0][1:])))

    def first_row(self) -> VqaRow | None:
        """A question for the round trip."""
        return self.rows[0] if self.rows else None


@dataclass(frozen=True)
class Job:
    """One run of the command, its settings checked."""

    model: str
    out: Path
    scheme: str
    how: dict[str, Any]
    seed: int
    device: str | None
    trust_remote_code: bool

    def run(
        self, calib: str | None, n_samples: int, max_tokens: int, steps: Plan, measures: Measures
    ) -> tuple[PreTrainedModel, RoundTrip]:
        """Quantize, save, check, measure, write the card; a signal that stops it says how to go on."""
        if calib is None:
            sources = "a folder of images, a .jsonl file or a known set"
            raise ValueError(f"--calib is missing: give {sources}, or --dry-run")
        folder = self.how["checkpoint_dir"]
        with terminal.stoppable(NOT_KEPT if folder is None else KEPT.format(folder)):
            return self._run(calib, n_samples, max_tokens, steps, measures)

    def _run(
        self, calib: str, n_samples: int, max_tokens: int, steps: Plan, measures: Measures
    ) -> tuple[PreTrainedModel, RoundTrip]:
        check_space(self.out.absolute(), steps.n_bytes_after)
        trust = self.trust_remote_code
        with terminal.working("loading calibration data and model"):
            processor = open_processor(self.model, trust_remote_code=trust)
            measures.tokenize(processor)
            batches = load(calib, processor, n_samples=n_samples, max_tokens=max_tokens, seed=self.seed)
            loaded = open_model(self.model, device=self.device, trust_remote_code=trust)
        for warning in steps.warnings():
            terminal.show_warning(warning)
        with terminal.working("measuring the original"):
            measures.measure(loaded, processor, "original")
        bar = terminal.LiveProgress(self.scheme)
        settings = {**self.how, "device": self.device, "seed": self.seed, "progress": bar}
        quantize(loaded, batches, self.scheme, **settings)
        folder = checkpoint.save(loaded, self.out, processor)
        with terminal.working("checking the round trip"):
            row = measures.first_row()
            result = check_round_trip(loaded, folder, processor, row=row, trust_remote_code=trust)
        with terminal.working("measuring the packed model"):
            measures.measure(loaded, processor, "model")
        if measures.table is not None:
            keep_evaluation(folder, measures.table, measures.described)
        write_card(folder)
        return loaded, result


def _named(path: Path) -> str:
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def check_folders(out: Path, model: str, checkpoint_dir: Path | None) -> None:
    """Refuse folders that are no place to write to, or that would replace each other.

    Raises:
        ValueError: OUT cannot be saved to, is MODEL, or holds the folder of finished blocks; or that holds other files.
    """
    checkpoint.check_target(out)
    if out.resolve() == Path(model).resolve():
        raise ValueError(f"OUT is MODEL itself ({model}), which would be replaced; choose another folder")
    if checkpoint_dir is None:
        return
    inner = checkpoint_dir.resolve()
    if out.resolve() in (inner, *inner.parents):
        raise ValueError(
            f"--checkpoint-dir {checkpoint_dir} lies in OUT ({out}), which is written as a whole; choose one beside it"
        )
    check_folder(checkpoint_dir)


def parse_overrides(texts: list[str]) -> dict[str, str | Scheme | None]:
    """Read PATTERN=SCHEME, where the scheme "none" keeps the layers in full precision, or the name of a preset.

    Raises:
        ValueError: no pattern or no scheme.
    """
    overrides: dict[str, str | Scheme | None] = {}
    for text in texts:
        if text in PRESETS:
            overrides |= PRESETS[text]
            continue
        pattern, _, scheme = text.rpartition("=")
        if not (pattern and scheme):
            example = "'vision=int8' or 'lm_head=none'"
            raise ValueError(f"--override {text!r}: expected PATTERN=SCHEME, such as {example}")
        overrides[pattern] = None if scheme.lower() == "none" else scheme
    return overrides
