"""`ossia push`: an export that is on the disk, uploaded to the hub; and the options of it that `ossia export` has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossia.cli.app import importing
from ossia.errors import UserError

if TYPE_CHECKING:
    from ossia.export.push import Hub

PushOption = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="Upload it to the Hugging Face hub, with a model card."),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Of --push: a new repository is private.")]


def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder or file that `ossia export` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it isn't there.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="The run it came from: its figures go on the card.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="OWNER/NAME", help="What its base model is called on the hub.")
    ] = None,
) -> None:
    """Upload an export to the Hugging Face hub. With a model card, in one commit. Prints its address."""
    with importing():
        from ossia.export.push import Hub, push_export

    print(push_export(path, Hub.open(repo, private=private), run=run, base=base))


def hub_for(repo: str | None, private: bool) -> Hub | None:
    """Where `ossia export` is to push to, checked before it writes; None: nowhere."""
    if repo is None:
        if private:
            raise UserError("--private is for --push: say where to push to, or leave it out")
        return None
    with importing():
        from ossia.export.push import Hub

    return Hub.open(repo, private=private)


def push_result(path: Path, hub: Hub | None, source: str) -> None:
    """Push what `ossia export` wrote of a run or a model, and print its address."""
    if hub is None:
        return
    with importing():
        from ossia.export.push import push_export

    folder = Path(source).expanduser()
    is_run = (folder / "recipe.yaml").is_file()
    print(push_export(path, hub, run=folder if is_run else None, base=None if is_run else source))
