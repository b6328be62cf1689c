"""The command line: ``npas-fx``."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from torch import nn

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
        _fail(
            "The demo needs scikit-learn for its pictures: "
            'pip install -c constraints.txt -e ".[demo]"'
        )
    except (NPASError, OSError) as err:
        _fail(f"{type(err).__name__}: {err}")
    if not all(check.is_passed for check in checks):
        raise typer.Exit(1)


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="What returns the model, or the model and its example inputs.",
        ),
    ],
    meta: Annotated[
        bool, typer.Option("--meta", help="Build the model on the meta device, without memory.")
    ] = False,
) -> None:
    """Print what a model is made of: its sites, what stays and why, and its repeated blocks."""
    from npas_fx import api
    from npas_fx.errors import NPASError

    model, inputs = _build_model(target, meta)
    try:
        if isinstance(inputs, dict):
            typer.echo(api.inspect(model, example_kwargs=inputs))
        else:
            typer.echo(api.inspect(model, example_inputs=inputs))
    except NPASError as err:
        _fail(f"{type(err).__name__}: {err}")


def _build_model(target: str, meta: bool) -> tuple[nn.Module, Any]:
    """Call what a target names.

    Args:
        target: ``package.module:callable``, looked for in the current directory too.
        meta: whether to build on the meta device.

    Returns:
        The model, and its example inputs: a tensor, a tuple, a dict of keyword arguments or None.
    """
    import torch
    from torch import nn

    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        _fail(
            f"{target!r} is not of the form package.module:callable, say torchvision.models:vgg11"
        )
    sys.path.insert(0, str(Path.cwd()))  # a console script does not look there, unlike python -m
    try:
        build: Any = importlib.import_module(module_name)
        for name in path.split("."):
            build = getattr(build, name)
    except Exception as err:  # whatever a user's code raises, here and below
        _fail(f"{target} cannot be imported: {type(err).__name__}: {err}")
    if not callable(build) or isinstance(build, nn.Module):
        _fail(
            f"{target} is a {type(build).__name__}; name a function or class that makes the model"
        )
    try:
        with torch.device("meta") if meta else nullcontext():
            made = build()
    except Exception as err:
        _fail(f"{target}() raised {type(err).__name__}: {err}")
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        _fail(
            f"{target}() returned no model, but {type(made).__name__}; "
            "return a model, or a model and its example inputs"
        )
    return model, inputs


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
