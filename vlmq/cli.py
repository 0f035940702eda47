"""The command line: `vlmq quantize | distill | eval | inspect | export | bench | demo`.

Nothing is decided here: each command opens what it is given, calls one function, and prints a table or, with
--json, a JSON object on stdout. Whatever the user can put right ends with one line on stderr and exit code 2.
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from vlmq import checkpoint, terminal
from vlmq.calib.data import load
from vlmq.calib.saliency import SALIENCIES, read_options
from vlmq.cli_bench import bench_command
from vlmq.cli_distill import distill_command
from vlmq.cli_eval import eval_command
from vlmq.cli_export import export_command
from vlmq.eval.demo import run_demo
from vlmq.eval.report import Table
from vlmq.eval.size import disk_bytes, model_size
from vlmq.eval.summary import kernel_table, layer_table, part_table, plan_table
from vlmq.opening import check_device, open_empty, open_model, open_processor
from vlmq.options import parse_options
from vlmq.planning import PRESETS, Plan, plan
from vlmq.quantization import DEFAULT_ALPHA, DEFAULT_SALIENCY, check_alpha, quantize
from vlmq.scheme import Scheme
from vlmq.staging import check_space

TOKEN_WEIGHTS = ", ".join(SALIENCIES)
DEMO_FOLDER = Path("vlmq-demo")

app = typer.Typer(
    help="Low-bit quantization of vision-language models, weighted by token saliency.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda or cuda:1; the CPU unless told.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
Seed = Annotated[int, typer.Option(help="The same seed on the same machine gives the same packed bytes.")]


@app.command("quantize")
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
    seed: Seed = 0,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Quantize MODEL and save it packed into OUT."""
    overrides = parse_overrides(override or [])
    options = parse_options(option or [])
    saliency_options = parse_options(saliency_option or [], flag="--saliency-option")
    check_alpha(alpha)
    read_options(saliency, saliency_options)
    check_device(device)
    checkpoint.check_target(out)
    _check_not_itself(out, model)
    with terminal.working("planning"):
        empty = open_empty(model, trust_remote_code=trust_remote_code)
        steps = plan(
            empty, scheme, solver=solver, overrides=overrides, options=options, embeddings=embeddings
        )
    if dry_run:
        _show_plan(steps, json)
        return
    if calib is None:
        sources = "a folder of images, a .jsonl file or a known set"
        raise ValueError(f"--calib is missing: give {sources}, or --dry-run")
    check_space(out.absolute(), steps.n_bytes_after)
    with terminal.working("loading calibration data and model"):
        processor = open_processor(model, trust_remote_code=trust_remote_code)
        batches = load(calib, processor, n_samples=n_samples, max_tokens=max_tokens, seed=seed)
        loaded = open_model(model, device=device, trust_remote_code=trust_remote_code)
    for warning in steps.warnings():
        terminal.show_warning(warning)
    quantize(
        loaded,
        batches,
        scheme,
        solver=solver,
        saliency=saliency,
        saliency_options=saliency_options,
        alpha=alpha,
        overrides=overrides,
        options=options,
        embeddings=embeddings,
        device=device,
        seed=seed,
        progress=terminal.LiveProgress(scheme),
    )
    checkpoint.save(loaded, out, processor)
    tables = {"parts": part_table(loaded)} | ({"layers": layer_table(loaded)} if json else {})
    _show_model(loaded, out, json, tables=tables)


app.command("eval")(eval_command)
app.command("distill")(distill_command)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a packed model.")],
    layers: Annotated[bool, typer.Option("--layers", help="Also list every layer.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Show what a packed model is made of: parts, true bits, kernels, how it was made."""
    with terminal.working("loading"):
        loaded = checkpoint.load(model, trust_remote_code=trust_remote_code)
    tables = {"parts": part_table(loaded), "kernels": kernel_table(loaded)}
    if layers:
        tables["layers"] = layer_table(loaded)
    _show_model(loaded, Path(model), json, tables=tables)


app.command("export")(export_command)


app.command("bench")(bench_command)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the report and the packed models.")] = DEMO_FOLDER,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Quantize the model that ships with vlmq to four widths, and show what it cost. Offline."""
    terminal.follow("vlmq.eval.demo")
    demo = run_demo(out, seed=seed, progress=terminal.LiveProgress("demo"))
    terminal.show({"models": demo.table}, json, lines=[f"wrote {path}" for path in demo.files])


def _check_not_itself(out: Path, model: str) -> None:
    if out.resolve() == Path(model).resolve():
        raise ValueError(f"OUT is MODEL itself ({model}), which would be replaced; choose another folder")


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


def _show_plan(steps: Plan, json: bool) -> None:
    figures = {
        "coverage": steps.coverage,
        "true_bits_per_weight": steps.true_bits_per_weight,
        "n_bytes_before": steps.n_bytes_before,
        "n_bytes_after": steps.n_bytes_after,
        "kept": steps.kept,
        "warnings": steps.warnings(),
    }
    if json:
        terminal.show({"plan": plan_table(steps), **figures}, json)
    else:
        terminal.out.print(str(steps), highlight=False, markup=False)


def _show_model(model: PreTrainedModel, folder: Path, json: bool, *, tables: dict[str, Table]) -> None:
    size = model_size(model)
    n_bytes = disk_bytes(folder) if folder.is_dir() else None
    metadata = model.config.quantization_config.metadata
    content = {
        **tables,
        "true_bits_per_weight": size.bits_per_weight,
        "bits_per_parameter": size.bits_per_parameter,
        "coverage": size.coverage,
        "n_bytes_on_disk": n_bytes,
        "metadata": metadata,
    }
    on_disk = "" if n_bytes is None else f"; {n_bytes / 1e6:.1f} MB in {folder}"
    covered = f"in {size.n_quantized_layers} layers with {size.coverage:.1%} of all parameters"
    lines = [
        f"{size.bits_per_weight:.3f} true bits per weight {covered}; "
        f"{size.bits_per_parameter:.3f} bits per parameter of everything{on_disk}",
        *(f"{key}: {value}" for key, value in metadata.items()),
    ]
    terminal.show(content, json, lines=lines)


def _message(error: Exception) -> str:
    """What an error says, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main() -> None:
    """Run the command line; what the user can put right becomes one line on stderr and exit code 2."""
    terminal.quiet_libraries()
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        terminal.show_error(_message(error))
        raise SystemExit(2) from None
