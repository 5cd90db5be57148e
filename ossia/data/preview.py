"""Samples for people to look at: which token is whose, which are trained, and where a target isn't the token itself.

What is trained is said by a mark in a column of its own as well as by colour and underline, so that a log file or a
screen reader has it too. Control characters of the data are shown, never sent to the terminal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise, zip_longest
from time import monotonic
from typing import NamedTuple

from rich.console import Console, ConsoleRenderable, Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ossia.data.dataset import Dataset, Statistics, in_order
from ossia.data.sample import Sample
from ossia.harmony.vocab import Vocabulary

TRAINED, CONTEXT = "+", "."
_SAY_EVERY_S = 10.0
LEGEND = f"{TRAINED} trained   {CONTEXT} context only   A→B: token A is predicted as B"
_STYLES = {
    ("assistant", "analysis"): "yellow",
    ("assistant", "commentary"): "magenta",
    ("assistant", "final"): "green",
    ("assistant", None): "green",
    ("user", None): "cyan",
    ("tool", None): "blue",
}
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Run(NamedTuple):
    """Neighbouring tokens of one author and one weight: positions [start, end) of a sample."""

    start: int
    end: int
    role: str | None
    channel: str | None
    weight: float

    @property
    def label(self) -> str:
        """Who speaks, on which channel, and the weight where it isn't 0 or 1."""
        words = [word for word in (self.role, self.channel) if word]
        return " ".join(words if self.weight in (0, 1) else [*words, f"x{self.weight:g}"])


def runs(sample: Sample) -> list[Run]:
    """The sample cut wherever author, channel or weight change."""
    roles, channels = sample.roles_and_channels()
    keys = list(zip(roles, channels, sample.weights.tolist(), strict=True))
    edges = [0, *(index for index in range(1, len(keys)) if keys[index] != keys[index - 1]), len(keys)]
    return [Run(start, end, *keys[start]) for start, end in pairwise(edges) if end > start]


def token_texts(sample: Sample, vocab: Vocabulary, start: int, end: int) -> list[str]:
    """What to show for positions [start, end): the token, and its target where that is another."""
    shown = [vocab.token(number) for number in sample.ids[start:end].tolist()]
    if sample.targets is not None:
        for offset in range(end - start):
            target = int(sample.targets[start + offset])
            if sample.weights[start + offset] and target != sample.ids[start + offset]:
                shown[offset] += f"→{vocab.token(target)}"
    return [_CONTROL.sub(_visible, text) for text in shown]


def _visible(match: re.Match[str]) -> str:
    """Tabs stay; another control or direction character is written as its escape."""
    char = match.group()
    return char if char == "\t" else char.encode("unicode_escape").decode()


def first_samples(datasets: Iterable[Dataset], limit: int) -> list[Sample]:
    """The first samples of every source in turn, `limit` in all."""
    columns = zip_longest(*(_head(dataset, limit) for dataset in datasets))
    return [sample for row in columns for sample in row if sample is not None][:limit]


def _head(dataset: Dataset, limit: int) -> list[Sample]:
    samples = in_order([dataset])
    return [sample for _, sample in zip(range(limit), samples, strict=False)]


def json_lines(datasets: Iterable[Dataset], limit: int | None) -> Iterator[str]:
    """The machine-readable form, a line a sample, in the order of the files; None: all of them."""
    for number, sample in enumerate(in_order(datasets)):
        if number == limit:
            return
        yield json.dumps(sample.to_json())


@contextmanager
def row_bar(datasets: Iterable[Dataset]) -> Iterator[Callable[[int], None]]:
    """Progress on stderr, a bar in a terminal and else a line now and then; yields what to call with the rows read."""
    total = sum(map(len, datasets))
    if not sys.stderr.isatty():
        yield _RowLines(total).read
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading rows", total=total)
        yield lambda rows: progress.update(task, completed=rows)


class _RowLines:
    """A line on stderr every ten seconds, for those who wait without a terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._said_s = total, monotonic()

    def read(self, rows: int) -> None:
        now = monotonic()
        if now - self._said_s >= _SAY_EVERY_S:
            self._said_s = now
            print(f"reading rows: {rows:,} of {self._total:,}", file=sys.stderr, flush=True)


def describe(sample: Sample) -> str:
    """Where the sample is from and how long it is."""
    return f"{sample.source}   {len(sample):,} tokens, {sample.num_trained:,} trained"


def sample_view(sample: Sample, vocab: Vocabulary) -> ConsoleRenderable:
    """One sample for the terminal: a line of runs each with its mark, author, number of tokens, and text."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold", ratio=1)
    for run in runs(sample):
        style = _STYLES.get((run.role or "", run.channel)) or _STYLES.get((run.role or "", None), "dim")
        text = Text(no_wrap=False, overflow="fold")
        trained = " underline" if run.weight else ""
        for offset, shown in enumerate(token_texts(sample, vocab, run.start, run.end)):
            is_special = vocab.is_special(int(sample.ids[run.start + offset]))
            token_style = " italic dim" if is_special else " bold" if offset % 2 else ""  # shows where a token ends
            text.append(shown, f"{style}{trained}{token_style}")
        mark = Text(TRAINED, "bold green") if run.weight else Text(CONTEXT, "dim")
        grid.add_row(mark, Text(run.label, style), Text(str(run.end - run.start), "dim"), text)
    return Group(Text(describe(sample), "bold"), grid, Text())


def totals_view(statistics: Statistics, notes: Iterable[str]) -> ConsoleRenderable:
    """The sources, the dataset's totals, and what was left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, value in totals(statistics):
        table.add_row(name, value)
    warnings = [Text(line, "yellow") for line in statistics.warnings()]
    return Group(*map(Text, notes), table, *warnings)


def totals(statistics: Statistics) -> list[tuple[str, str]]:
    """The figures of a dataset, by name, for people."""
    counts = {
        "rows": statistics.rows,
        "samples": statistics.samples,
        "tokens": statistics.tokens,
        "trained tokens": statistics.trained_tokens,
        "longest sample": statistics.longest,
        "dropped (too long)": statistics.dropped,
        "truncated": statistics.truncated,
        "left out (nothing trained)": statistics.untrained,
        "skipped rows": statistics.skipped,
    }
    return [(name, f"{count:,}") for name, count in counts.items()]


def show(
    samples: Iterable[Sample], statistics: Statistics, notes: Iterable[str], vocab: Vocabulary, console: Console
) -> None:
    """Samples, what the marks mean, and the totals, on a console."""
    for sample in samples:
        console.print(sample_view(sample, vocab))
    console.print(Text(LEGEND, "dim"))
    console.print(totals_view(statistics, notes))
