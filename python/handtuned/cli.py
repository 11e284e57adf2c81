"""The handtuned command: info, compare, tune.

Exit codes: 0, 1 where this machine lacks something (a GPU, a package), 2 for bad input; both with one line that says
what to do. Heavy imports wait until a command is known to be well-formed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="handtuned",
    help="Hand-tuned kernels for torch modules: what is built here, what it brings on a real model, tuning.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

PIPED_WIDTH = 150  # columns where standard output is no terminal and COLUMNS is not set


def main() -> None:
    """Entry point of the console script and of python -m handtuned."""
    try:
        status = app(args=sys.argv[1:] or ["--help"], prog_name="handtuned", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors, wherever typer keeps its click
            raise
        typer.echo(f"handtuned: {error.format_message()}", err=True)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(command: str, message: str, code: int = 2) -> NoReturn:
    typer.echo(f"handtuned {command}: {message}", err=True)
    raise typer.Exit(code)


def _print(make: Callable[[int], object]) -> None:
    """Prints make(width) on standard output."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(width=PIPED_WIDTH if piped else None)
    console.print(make(console.width))


# ---- info -----------------------------------------------------------------------------------------------------------


@app.command()
def info(json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """CPU, instruction sets, torch, and every kernel by op and backend: built or not, and why."""
    import handtuned

    facts = handtuned.info()
    if json_:
        typer.echo(json.dumps(facts.as_dict(), indent=1))
    else:
        _print(lambda width: facts)


# ---- compare --------------------------------------------------------------------------------------------------------


@app.command()
def compare(
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page with plots.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for torch and handtuned; by default torch's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    module: Annotated[
        str | None, typer.Option(help="Only modules whose name contains this, and not the whole model.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sentences in a batch; attention also at 1 and 8.")] = 32,
    seconds: Annotated[float, typer.Option(help="Time for timing, shared by all rows.")] = 30.0,
    rounds: Annotated[int | None, typer.Option(help="Exactly so many rounds per row, however long they take.")] = None,
) -> None:
    """A pretrained model on real sentences: torch's modules and attention against handtuned's, error and speed."""
    import torch

    from .compare import DTYPES, ModelUnavailable, NoSuchModule, Settings
    from .compare import compare as run
    from .compare.page import page
    from .compare.report import render

    if dtype not in DTYPES:
        _fail("compare", f"--dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    for option, value in (("batch", batch), ("threads", threads), ("rounds", rounds)):
        if value is not None and value < 1:
            _fail("compare", f"--{option} is {value}, the least is 1")
    if not 0 < seconds < float("inf"):
        _fail("compare", f"--seconds is {seconds:g}, it must be positive and finite; the default is 30")
    _require_writable("--json", json_)
    _require_writable("--html", html)
    if json_ and html and json_.resolve() == html.resolve():
        _fail("compare", f"--json and --html are both {html}; name two files")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        with _progress() as progress:
            comparison = run(Settings(dtype, batch, module, seconds, rounds), progress)
    except ModelUnavailable as error:
        _fail("compare", str(error), 1)
    except NoSuchModule as error:
        _fail("compare", f"--module: {error}")
    finally:
        torch.set_num_threads(before)
    _print(lambda width: render(comparison, width))
    if json_:
        json_.write_text(comparison.as_json() + "\n", encoding="utf-8")
    if html:
        html.write_text(page(comparison), encoding="utf-8")


def _require_writable(option: str, path: Path | None) -> None:
    """Fails now rather than after the measuring; leaves no file behind."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        _fail("compare", f"{option} {path}: {error.strerror}; name a file in a folder that exists and is writable")
    if not existed:
        path.unlink()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else one line per stage on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (sys.stdout.isatty() and console.is_terminal):
        yield _lines()
        return
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), BarColumn(30), TaskProgressColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def update(stage: str, done: float) -> None:
            new = bar.tasks[task].description != stage
            bar.update(task, description=stage, completed=done, refresh=new)

        yield update


def _lines() -> Callable[[str, float], None]:
    last = ""

    def update(stage: str, done: float) -> None:
        nonlocal last
        if stage != last:
            typer.echo(f"{done:4.0%} {stage}", err=True)
            last = stage

    return update


# ---- tune -----------------------------------------------------------------------------------------------------------


@app.command()
def tune(
    cols: Annotated[list[int] | None, typer.Option(help="Row lengths to tune for.  [default: 1024 4096 8192]")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "bfloat16",
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="forward, backward, row_sums or partials.  [default: forward, backward, partials]"),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Rows to measure with; by default about 2^26 elements.")] = None,
) -> None:
    """Measures tile sizes of the Triton kernels on this GPU and keeps the fastest for this user."""
    from .compare import DTYPES

    if dtype not in DTYPES:
        _fail("tune", f"--dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    if rows is not None and rows < 1:
        _fail("tune", f"--rows is {rows}, the least is 1")
    try:
        tune_tiles = importlib.import_module("handtuned.triton_kernels.tune_tiles")
    except ImportError as error:
        _fail("tune", f"{error}; Triton's kernels need it: pip install triton", 1)
    try:
        for name in kernel or ("forward", "backward", "partials"):
            for length in cols or (1024, 4096, 8192):
                best = tune_tiles.tune_norm(name, length, DTYPES[dtype], rows, typer.echo)
                typer.echo(f"{name}, {length} columns of {dtype}: {best}")
    except ValueError as error:
        _fail("tune", str(error))
    except RuntimeError as error:
        _fail("tune", " ".join(str(error).split()), 1)
    typer.echo(f"kept in {tune_tiles.tuning.user_file()}")
