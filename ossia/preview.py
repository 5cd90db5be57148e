"""`ossia data`: what a recipe's data, or its tasks, become as tokens, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ossia.config import Recipe
from ossia.data.dataset import open_datasets, scan
from ossia.data.page import write_page
from ossia.data.preview import first_samples, json_lines, row_bar, show
from ossia.data.tokenizer import open_vocabulary
from ossia.disk import why_no_file
from ossia.errors import UserError

_SHOWN = 5


class _Pipe(Console):
    """A console that leaves to the command line what happens when a pipe's reader goes; Rich's own ends with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show_data(recipe: Recipe, *, limit: int | None, as_json: bool, html: Path | None) -> None:
    """Print the first samples and the totals of the recipe's `data` (the held-out split not yet made), or write a page.

    Of a recipe that learns from rewards: the first tasks, and whether its environments hold (`show_tasks`).

    limit    so many samples; None: all of them
    as_json  one JSON object a sample on stdout, in the order of the files, and nothing else; no totals
    html     write this file instead of printing
    Raises   DataError, with the first few of all bad rows, and what the tokenizer and the sources raise; UserError for
             two forms at once or a page that can't be written; BrokenPipeError where stdout's reader has seen enough
    """
    if recipe.method == "grpo":
        if html is not None:
            raise UserError("--html: a page shows rows; this recipe's tasks are shown without it, or with --json")
        from ossia.run.tasks import show_tasks  # here, since only this needs torch

        show_tasks(recipe, limit=limit or _SHOWN, as_json=as_json, console=_Pipe())
        return
    if html is not None and as_json:
        raise UserError("--json and --html: choose one")
    if html is not None and (why := why_no_file(html)):
        raise UserError(f"--html {html}: can't be written: {why}\n  next: name a file in a folder that is there")
    vocab = open_vocabulary(recipe.model)
    datasets = open_datasets(recipe, vocab)
    if as_json:
        for line in json_lines(datasets.whole, limit):
            print(line)
        return
    with row_bar(datasets.whole) as progress:
        totals = scan(datasets.whole, progress)
    samples = first_samples(datasets.whole, totals.samples if limit is None else limit)
    if html is None:
        show(samples, totals, datasets.notes, vocab, _Pipe())
    else:
        write_page(html, samples, totals, datasets.notes, vocab)
        print(html)
