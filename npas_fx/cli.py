"""The command line: ``npas-fx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from npas_fx import __version__

        typer.echo(f"npas_fx {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Fit PyTorch models into a parameter budget by sharing their weights."""


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where plans and weights are written.", file_okay=False)
    ] = Path("npas-fx-demo"),
    steps: Annotated[int, typer.Option(help="Training steps of each network.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the pictures.")] = 0,
) -> None:
    """Train a small network on pictures of digits: plain, at 25 % and at 150 % of its size."""
    # Imported here, so that --help does not wait for what only this command needs.
    from npas_fx.demo import run_demo
    from npas_fx.errors import NPASError

    try:
        _, checks = run_demo(folder, steps=steps, seed=seed)
    except ModuleNotFoundError as err:
        if (err.name or "").partition(".")[0] != "sklearn":
            raise
        typer.echo(
            "The demo needs scikit-learn for its pictures: "
            'pip install -c constraints.txt -e ".[demo]"',
            err=True,
        )
        raise typer.Exit(1) from None
    except (NPASError, OSError) as err:
        typer.echo(f"{type(err).__name__}: {err}", err=True)
        raise typer.Exit(1) from None
    if not all(check.is_passed for check in checks):
        raise typer.Exit(1)
