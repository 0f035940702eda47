"""The command line: `vlmq quantize | distill | push | eval | inspect | export | bench | demo`.

Nothing is decided here: each command opens what it is given, calls one function, and prints a table or, with
--json, a JSON object on stdout. Whatever the user can put right ends with one line on stderr and exit code 2.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from vlmq import checkpoint, hub, terminal
from vlmq.cli_bench import bench_command
from vlmq.cli_distill import distill_command
from vlmq.cli_eval import eval_command
from vlmq.cli_export import export_command
from vlmq.cli_quantize import quantize_command
from vlmq.cli_show import show_model
from vlmq.eval.demo import run_demo
from vlmq.eval.summary import kernel_table, layer_table, part_table, share_table
from vlmq.families import describe
from vlmq.families.coverage import shares_of_packed

DEMO_FOLDER = Path("vlmq-demo")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
Seed = Annotated[int, typer.Option(help="The same seed on the same machine gives the same packed bytes.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"vlmq {version('vlmq')}")
        raise typer.Exit


@app.callback()
def version_option(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Low-bit quantization of vision-language models, weighted by token saliency."""


app.command("quantize")(quantize_command)
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
    coverage = share_table(shares_of_packed(describe(loaded)))
    tables = {"parts": part_table(loaded), "parameters": coverage, "kernels": kernel_table(loaded)}
    if layers:
        tables["layers"] = layer_table(loaded)
    show_model(loaded, Path(model), json, tables=tables)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    repository: Annotated[str, typer.Argument(help="Such as me/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Repository of the original; known if MODEL came from a hub.")
    ] = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Upload a packed model with its card; after a failure, send only what has not arrived."""
    with terminal.working(f"uploading to {repository}"):
        url = hub.push(
            folder, repository, private=private, base_model=base_model, trust_remote_code=trust_remote_code
        )
    terminal.show({"pushed": url}, json, lines=[f"pushed: {url}"])


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


def _message(error: Exception) -> str:
    """What an error says, with its notes and without the number that the system gives it."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return "; ".join((text, *getattr(error, "__notes__", ())))


def main() -> None:
    """Run the command line; what the user can put right becomes one line on stderr and exit code 2."""
    terminal.quiet_libraries()
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        terminal.show_error(_message(error))
        raise SystemExit(2) from None
