"""Export, top to bottom: open the source, write the folder, read it back, compare it, and only then give it its name.

One entry of `_FORMATS` a format; each writes a folder of which `Checkpoint.open` makes a model again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ossia.errors import CheckpointError, UserError
from ossia.export.merge import write_merged
from ossia.export.source import Source, open_source
from ossia.export.verify import Agreement, changed_model, compare, fixed_texts, held_out_texts
from ossia.harmony import Vocabulary
from ossia.model.arch import Layout
from ossia.model.checkpoint import Checkpoint

_FORMATS: dict[str, Layout] = {"hf-bf16": "bf16"}
# How far an export may be from what was trained: KL divergence in nats, mean over the positions compared. A share of
# what training changed, between what rounding alone does to untrained routers and what nobody should deploy.
MAX_SHARE = 0.05
MIN_KL, MAX_KL = 0.002, 0.02


def export_model(source: str, *, to: str, output: Path, adapter: str | None = None) -> Path:
    """Write a model as other programs load it, verified by reading it back.

    source   a run folder, or a model (a checkpoint's folder, or owner/name on the hub)
    to       hf-bf16: a Hugging Face folder with everything merged, in bfloat16
    output   a folder that isn't there yet
    adapter  of a model: a run folder or an adapter's folder
    Returns  the folder
    Raises   UserError for what can't be exported; CheckpointError if what was written isn't the model that
             was trained, see `verify_export`, or can't be written. Nothing is left behind then.
    """
    if to not in _FORMATS:
        raise UserError(f"--to {to}: no such format; allowed: {', '.join(_FORMATS)}")
    output = Path(output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output} exists already; name a new folder or remove it first")
    opened = open_source(source, adapter, _say)
    unverified = output.absolute().with_name(f".{output.name}.unverified")
    shutil.rmtree(unverified, ignore_errors=True)  # what a killed export left
    try:
        with Progress(
            TextColumn("writing"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            task = bar.add_task("write")
            write_merged(
                unverified,
                opened.base,
                opened.changes,
                opened.base.path,
                _FORMATS[to],
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        verify_export(opened, unverified, _say)
        unverified.rename(output.absolute())
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    return output


def verify_export(source: Source, folder: Path, say: Callable[[str], None]) -> Agreement:
    """Compare an exported folder with what it was made from, on held-out texts of the run, or else on fixed ones.

    Raises  CheckpointError if the folder doesn't open, or its KL divergence from what was trained is over
            MAX_SHARE of that between base and trained, at least MIN_KL and at most MAX_KL nats
    """
    vocab = Vocabulary.from_file(source.base.path)
    packs = [] if source.recipe is None else held_out_texts(source.recipe, vocab)
    texts = f"{len(packs)} held-out texts" if packs else "fixed texts"
    packs = packs or fixed_texts(vocab)
    trained = changed_model(source.base, source.changes)
    found, before = compare(trained, [changed_model(Checkpoint.open(folder)), changed_model(source.base)], packs)
    say(f"read back and compared with what was trained, on {texts}: {found}")
    allowed = min(max(MAX_SHARE * before.kl, MIN_KL), MAX_KL)
    if not found.kl <= allowed:  # written so that nan fails it
        raise CheckpointError(
            f"the exported model isn't the one that was trained: {found}\n"
            f"  allowed: a KL divergence of {allowed:.2e} nats, training itself made {before.kl:.2e}\n"
            "  next: check that the base model is the one it was trained on, or try an earlier checkpoint"
        )
    if found.kl > MAX_SHARE * before.kl:
        say(
            f"mind: training moved the model by a KL of only {before.kl:.2e} nats, and rounding to bfloat16 loses part "
            "of that; an adapter kept apart loses nothing"
        )
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr)
