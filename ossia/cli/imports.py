"""`ossia import-recipe`: a config of another trainer as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ossia.cli.app import importing
from ossia.errors import UserError


def import_recipe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An Axolotl config, a YAML file.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="RECIPE", help="Where the recipe goes; left out: to stdout.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPUs that the config ran on; they multiply its batch.")
    ] = None,
) -> None:
    """An Axolotl config as a recipe. Says on stderr what became of every key."""
    with importing():
        from ossia.axolotl import as_text, import_axolotl
        from ossia.config.load import recipe_file_text

    found = import_axolotl(recipe_file_text(file), str(file), gpus)
    print(as_text(found), file=sys.stderr)
    if output is None:
        print(found.text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as handle:
            handle.write(found.text)
    except FileExistsError:
        raise UserError(f"--output {output}: is there already\n  next: name another file") from None
    except OSError as error:
        raise UserError(f"--output {output}: can't be written: {error.strerror}") from None
    print(f"next: ossia plan {output}", file=sys.stderr)
    print(output)
