"""`ossia data`: what a recipe's data becomes, as tokens, before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ossia.config import Recipe, is_hub_name
from ossia.data.dataset import Dataset, Statistics, open_datasets, scan
from ossia.data.page import write_page
from ossia.data.preview import first_samples, json_lines, show
from ossia.errors import MissingExtraError, TokenizerError
from ossia.harmony.vocab import Vocabulary


def show_data(recipe: Recipe, *, limit: int | None, as_json: bool, html: Path | None) -> None:
    """Print the first samples and the totals of the recipe's `data` (the held-out split not yet made), or write a page.

    limit    so many samples; None: all of them
    as_json  one JSON object a sample on stdout, in the order of the files, and nothing else; no totals
    html     write this file instead of printing
    Raises   DataError, with the first few of all bad rows, and what the tokenizer and the sources raise
    """
    vocab = Vocabulary.from_file(_tokenizer(recipe.model))
    datasets = open_datasets(recipe, vocab)
    if as_json:
        for line in json_lines(datasets.whole, limit):
            print(line)
        return
    totals = _scan(datasets.whole)
    samples = first_samples(datasets.whole, totals.samples if limit is None else limit)
    if html is None:
        show(samples, totals, datasets.notes, vocab, Console())
    else:
        write_page(html, samples, totals, datasets.notes, vocab)
        print(html)


def _scan(datasets: tuple[Dataset, ...]) -> Statistics:
    """The totals, with a bar on stderr for those who wait."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading rows", total=sum(map(len, datasets)))
        return scan(datasets, lambda rows: progress.update(task, completed=rows))


def _tokenizer(model: str) -> Path:
    """The model's folder, or the `tokenizer.json` of a hub model and nothing else of it."""
    if not is_hub_name(model):
        return Path(model).expanduser()
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError(f"{model}: no such folder; from the hub: pip install 'ossia[hub]'") from error
    try:
        return Path(hf_hub_download(model, "tokenizer.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TokenizerError(f"{model}: its tokenizer.json can't be fetched: {str(error).splitlines()[0]}") from error
