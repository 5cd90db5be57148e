"""`ossia merge-shards`: a run whose weights are cut over ranks, as one folder that other programs load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ossia.cli.app import importing


class FolderFormat(StrEnum):
    """What a folder's experts are stored in."""

    hf_bf16 = "hf-bf16"
    hf_mxfp4 = "hf-mxfp4"


def merge_shards(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with sharded checkpoints.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="A folder not there yet; RUN/merged if left out.")
    ] = None,
    to: Annotated[
        FolderFormat | None, typer.Option("--to", help="What to write; as the run's own result if left out.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", min=0.0, help="KL divergence from what was trained, in nats, that is not refused."),
    ] = None,
) -> None:
    """Write the last complete sharded checkpoint of a run as one model. By one process, and again after a full disk."""
    with importing():
        from ossia.export import merge_shards as merge

    print(merge(run, to=None if to is None else to.value, output=output, max_kl=max_kl))
