"""Rows -> samples: the rules for bad rows and long samples, what is counted, the held-out split, the order of an epoch.

A `Dataset` reads a row when it is asked for it and keeps nothing, so its size is that of its row index. No torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ossia.config.schema import DataSourceConfig, Recipe
from ossia.data.formats import Encoder, build
from ossia.data.layout import FIELDS, Layout, recognise
from ossia.data.rows import Rows, printable
from ossia.data.sample import Sample
from ossia.data.sources import open_rows
from ossia.errors import DataError, HarmonyError, RecipeError, TokenizerError
from ossia.harmony.openai_tools import nearest
from ossia.harmony.render import MOST_SAMPLES, Renderer, TrainOn
from ossia.harmony.vocab import Vocabulary

_NUM_REASONS = 5
_MOST_PLACES = 2**32  # of an epoch; its order is held in memory
_PASS, _EPOCH = 1, 2  # keep the random streams of one seed apart


class Reading(NamedTuple):
    """What became of one row."""

    samples: list[Sample]
    problem: str | None = None  # why the row was skipped
    dropped: int = 0
    truncated: int = 0
    untrained: int = 0
    ignored: tuple[str, ...] = ()
    null_arguments: bool = False
    notes: tuple[str, ...] = ()  # what is legal in the row but may not be meant


@dataclass(slots=True)
class Statistics:
    """Counts of what was read; a row that is read twice counts twice.

    tokens, trained_tokens, longest are of the samples that are used, in tokens.
    dropped         samples over the length limit that are left out; truncated: cut to it
    untrained       samples left out because no token of them is trained
    skipped         rows that could not be used; `reasons` are the first few
    ignored         columns that Ossia doesn't know, and in how many rows
    null_arguments  rows with a null among the arguments of a tool call
    noted           what is legal but may not be meant, and in how many rows
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    dropped: int = 0
    truncated: int = 0
    untrained: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    null_arguments: int = 0
    noted: dict[str, int] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        """Count one row."""
        self.rows += 1
        for sample in reading.samples:
            self.samples += 1
            self.tokens += len(sample)
            self.trained_tokens += sample.num_trained
            self.longest = max(self.longest, len(sample))
        self.dropped += reading.dropped
        self.truncated += reading.truncated
        self.untrained += reading.untrained
        if reading.problem is not None:
            self.skipped += 1
            if len(self.reasons) < _NUM_REASONS:
                self.reasons.append(reading.problem)
        self.null_arguments += reading.null_arguments
        for name in reading.ignored:
            self.ignored[name] = self.ignored.get(name, 0) + 1
        for note in reading.notes:
            self.noted[note] = self.noted.get(note, 0) + 1

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, copied."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        counted = {name: dict(record.get(name, {})) for name in ("ignored", "noted")}
        return cls(**{**record, "reasons": list(record["reasons"]), **counted})

    def warnings(self) -> list[str]:
        """One entry for each thing that was not used as it is in the file; empty if all was."""
        found = []
        if self.skipped:
            found.append("\n  ".join([f"rows skipped: {self.skipped:,} of {self.rows:,}, the first:", *self.reasons]))
        if self.dropped:
            found.append(f"samples dropped, longer than max_length: {self.dropped:,}")
        if self.truncated:
            found.append(f"samples truncated to max_length: {self.truncated:,}")
        if self.untrained:
            found.append(f"samples left out, no token of them is trained: {self.untrained:,}")
        if self.null_arguments:
            found.append(
                f"rows whose tool calls have null among their arguments, kept as written: {self.null_arguments:,}\n"
                "  the model learns to write them; where only the export of a table put them there, leave them out"
            )
        noted = [f"rows with {printable(note)}: {count:,}" for note, count in sorted(self.noted.items())]
        unused = [
            f"rows with the column `{printable(name)}`, which is not used: {count:,}{nearest(name, FIELDS, 0.75)}"
            for name, count in sorted(self.ignored.items())
        ]
        return [*found, *noted, *unused]


@dataclass(frozen=True, slots=True)
class Limits:
    """What happens to samples over `max_length` tokens and to rows that can't be used."""

    max_length: int
    on_long: Literal["error", "drop", "truncate"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Samples of one source, by row.

    layout   how a row becomes a conversation, a text or ids
    weight   average number of times that a row is read in an epoch
    chosen   (num_chosen,) int64 rows of the source that belong to this dataset; None: all of them
    """

    rows: Rows
    layout: Layout
    encoder: Encoder
    limits: Limits
    weight: float = 1.0
    chosen: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.chosen is None else len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """Changes when the content, the choice of rows or the weight does."""
        chosen = "all" if self.chosen is None else f"{len(self)} of them, crc32 {zlib.crc32(self.chosen.tobytes()):08x}"
        return f"{self.rows.fingerprint}, {chosen}, weight {self.weight:g}"

    def read(self, index: int) -> Reading:
        """Row `index` (0 .. len - 1) as samples, with what was left out.

        Raises  DataError for a row that can't be used or a sample that is too long, where the limits say error
        """
        row = index if self.chosen is None else int(self.chosen[index])
        where = self.rows.where(row)
        try:
            content = self.rows.row(row)
        except DataError as error:
            return self._bad(str(error), error)
        notes: list[str] = []
        try:
            samples = build(self.layout, content, where, self.encoder, notes)
            null_arguments = self.layout.has_null_arguments(content)
        except (DataError, HarmonyError, TokenizerError) as error:
            return self._bad(f"{where}: {error}", error)
        except RecursionError as error:
            return self._bad(f"{where}: a value in it is nested too deeply", error)
        reading = self._fit(samples, self.layout.ignored(content))
        return reading._replace(null_arguments=null_arguments, notes=tuple(notes))

    def samples(self, index: int) -> list[Sample]:
        """The samples of row `index`."""
        return self.read(index).samples

    def _bad(self, problem: str, error: Exception) -> Reading:
        problem = printable(problem)
        if self.limits.on_bad_row == "skip":
            return Reading([], problem)
        raise DataError(f"{problem}\n  next: mend the row, or leave such rows out with on_bad_row: skip") from error

    def _fit(self, samples: list[Sample], ignored: tuple[str, ...]) -> Reading:
        limits, kept = self.limits, []
        dropped = truncated = 0
        untrained = int(not samples)  # a conversation of which nothing is trained has no sample at all
        for sample in samples:
            if len(sample) > limits.max_length:
                if limits.on_long == "error":
                    raise DataError(
                        f"{sample.source}: {len(sample):,} tokens, more than max_length, {limits.max_length:,}\n"
                        "  next: raise max_length, or on_long: drop, or on_long: truncate"
                    )
                if limits.on_long == "drop":
                    dropped += 1
                    continue
                sample = sample.truncated(limits.max_length)
                truncated += 1
            if sample.num_trained:
                kept.append(sample)
            else:
                untrained += 1
        return Reading(kept, None, dropped, truncated, untrained, ignored)


class EpochOrder:
    """Which row stands at which place of an epoch; decided by the datasets' sizes and weights, the seed and the epoch.

    Every source is an endless chain of shuffled passes, and an epoch takes its next weight x rows of it. So with
    weight 2 each row comes twice an epoch; with 0.5 half of the rows come, and the other half in the next epoch. All
    are then shuffled together. Costs 4 bytes a row (8 from 2**32 rows on).
    """

    def __init__(self, datasets: Sequence[Dataset], seed: int, epoch: int) -> None:
        self._datasets = datasets
        self._firsts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        kind = np.uint32 if self._firsts[-1] <= np.iinfo(np.uint32).max else np.int64
        self._order = np.concatenate(
            [
                _next_rows(dataset, np.arange(*self._firsts[number : number + 2], dtype=kind), seed, number, epoch)
                for number, dataset in enumerate(datasets)
            ]
        )
        np.random.default_rng((seed, _EPOCH, epoch)).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> tuple[Dataset, int]:
        number = int(self._order[position])
        source = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._datasets[source], number - int(self._firsts[source])


def _next_rows(dataset: Dataset, rows: NDArray[Any], seed: int, source: int, epoch: int) -> NDArray[Any]:
    """Those of `rows`, a source's row numbers, that the epoch takes from the chain of shuffled passes through them."""
    size, share = len(rows), dataset.weight * len(rows)
    what = f"{dataset.layout.source.path}: weight {dataset.weight:g} of {size:,} rows is"
    if share >= _MOST_PLACES:
        raise RecipeError(f"{what} over {_MOST_PLACES:,} rows an epoch; lower it")
    if share < 1:
        raise RecipeError(f"{what} less than one row an epoch; raise it")
    start, stop = (int(np.floor(count * share + 0.5)) for count in (epoch, epoch + 1))
    first_pass = start // size
    passes = [rows.copy() for _ in range(first_pass, -(-stop // size))]
    for number, shuffled in enumerate(passes, first_pass):
        np.random.default_rng((seed, _PASS, source, number)).shuffle(shuffled)
    return np.concatenate(passes)[start - first_pass * size : stop - first_pass * size]


# --- from a recipe ----------------------------------------------------------------------------------------------------


class Datasets(NamedTuple):
    """What a recipe trains on, what it holds out, its `data` before that split, and a line about each source."""

    train: tuple[Dataset, ...]
    held_out: tuple[Dataset, ...]
    whole: tuple[Dataset, ...]
    notes: list[str]


def open_datasets(recipe: Recipe, vocab: Vocabulary, *, check: bool = True) -> Datasets:
    """The recipe's sources, split into training and held-out rows.

    check   whether rows are rendered until something is trained; False for who asks `require_trained` afterwards
    Raises  DataError if a source can't be read, its format isn't clear, or nothing in it is trained; MissingExtraError
    """
    renderer, notes = Renderer(vocab), []

    def open_all(sources: Iterable[DataSourceConfig]) -> tuple[Dataset, ...]:
        return tuple(open_source(recipe, source, vocab, renderer, notes) for source in sources)

    whole = train = open_all(recipe.data or ())
    held_out: tuple[Dataset, ...] = ()
    if recipe.eval.data:
        held_out = open_all(recipe.eval.data)
    elif recipe.eval.split:
        train, held_out = split(train, recipe.eval.split, recipe.train.seed)
        sizes = [sum(map(len, part)) for part in (train, held_out)]
        notes.append(_split_note(recipe.eval.split, *sizes))
    if check:
        for dataset in (*train, *held_out):
            require_trained(dataset)
    return Datasets(train, held_out, whole, notes)


def open_source(
    recipe: Recipe, source: DataSourceConfig, vocab: Vocabulary, renderer: Renderer, notes: list[str]
) -> Dataset:
    """One source under the recipe's rules; a line about it is added to `notes`."""
    rows = open_rows(source.path, source.split)
    layout, why = recognise(rows, source, recipe.harmony)
    notes.append(f"{source.path}: {len(rows):,} rows, format {layout.format} ({why})")
    notes.extend(f"{source.path}: {remark}" for remark in rows.remarks)
    chosen = source.train or recipe.harmony.train
    encoder = Encoder(vocab, renderer, TrainOn(chosen.turns, chosen.channels))
    return Dataset(rows, layout, encoder, Limits(recipe.max_length, recipe.on_long, recipe.on_bad_row), source.weight)


def require_trained(dataset: Dataset) -> None:
    """Reads until the first trained token; raises DataError if there is none in the whole dataset."""
    counts = Statistics()
    for index in range(len(dataset)):
        reading = dataset.read(index)
        if reading.samples:
            return
        counts.add(reading)
    place = dataset.rows.where(0).rpartition(":")[0]
    found = "\n  ".join(counts.warnings() or ["its rows are empty"])
    raise DataError(f"{place}: no token of this source is trained\n  {found}")


def split(datasets: Sequence[Dataset], share: float, seed: int) -> tuple[tuple[Dataset, ...], tuple[Dataset, ...]]:
    """Training and held-out rows, apart: a row is held out if the hash of its own bytes with the seed is below `share`.

    So a row stays where it is when others are added or moved, and equal rows, in whichever source, stay together.
    Where the share would come to nothing, the row with the lowest hash is held out.
    Raises  DataError if that leaves a source without a row to train on
    """
    hashes = [dataset.rows.hashes(seed) for dataset in datasets]
    limit = max(int(share * 2.0**64), min(int(values.min()) for values in hashes) + 1)
    train, held_out = [], []
    for dataset, values in zip(datasets, hashes, strict=True):
        mask = values <= np.uint64(limit - 1)
        if mask.all():
            place = dataset.rows.where(0).rpartition(":")[0]
            raise DataError(f"{place}: eval.split {share:g} leaves no row of its {len(mask):,} to train on; lower it")
        train.append(replace(dataset, chosen=np.flatnonzero(~mask)))
        if mask.any():
            held_out.append(replace(dataset, chosen=np.flatnonzero(mask)))
    return tuple(train), tuple(held_out)


def _split_note(share: float, num_train: int, num_held_out: int) -> str:
    said = f"eval.split {share:g}: {num_train:,} rows to train on, {num_held_out:,} held out"
    expected = share * (num_train + num_held_out)
    if abs(num_held_out - expected) < 0.5 * expected + 1:
        return said
    return f"{said}; each row is drawn by itself, which for few rows may be far off: name rows in eval.data then"


def in_order(datasets: Iterable[Dataset], statistics: Statistics | None = None) -> Iterator[Sample]:
    """Every sample once, in the order of the files, whatever the weights; counted into `statistics`."""
    for dataset in datasets:
        for index in range(len(dataset)):
            reading = dataset.read(index)
            if statistics is not None:
                statistics.add(reading)
            yield from reading.samples


def scan(
    datasets: Iterable[Dataset],
    progress: Callable[[int], None] | None = None,
    each: Callable[[Dataset, int, list[Sample]], None] | None = None,
) -> Statistics:
    """Read and render every row once, to know the totals and every bad row before anything is trained.

    progress  is called after each row with the number of rows done
    each      is called with each good row's dataset, number and samples
    Raises    DataError with the first few bad rows and their number, where the limits say that one is an error
    """
    counts, problems, num_bad = Statistics(), [], 0
    for dataset in datasets:
        for index in range(len(dataset)):
            try:
                reading = dataset.read(index)
                counts.add(reading)
                if each is not None:
                    each(dataset, index, reading.samples)
            except DataError as error:
                counts.rows += 1
                num_bad += 1
                if num_bad <= _NUM_REASONS:
                    problems.append(str(error).partition("\n")[0])
            if progress is not None:
                progress(counts.rows)
    if problems:
        head = f"{num_bad:,} of {counts.rows:,} rows can't be used" + (
            ", the first of them:" if num_bad > len(problems) else ":"
        )
        raise DataError("\n  ".join([head, *problems]) + "\n  next: mend them, or see on_bad_row and on_long")
    return counts


Lengths = dict[Dataset, NDArray[np.int32]]  # (rows, MOST_SAMPLES): tokens of each row's samples, 0 where there is none


def measure(
    datasets: Datasets, most_held_out: int | None, progress: Callable[[int], None] | None = None
) -> tuple[Statistics, list[Sample], Lengths]:
    """`scan` what is trained on and what is held out, and keep what else has to be known before the first step.

    Returns  the totals; the held-out samples, at most `most_held_out`; the lengths of all samples, at 8 bytes a row
    Raises   as `scan`; DataError for a dataset of which nothing is trained
    """
    every = (*datasets.train, *datasets.held_out)
    held_out: list[Sample] = []
    lengths = {dataset: np.zeros((len(dataset), MOST_SAMPLES), np.int32) for dataset in every}

    def keep(dataset: Dataset, row: int, samples: list[Sample]) -> None:
        lengths[dataset][row, : len(samples)] = list(map(len, samples))
        if dataset in datasets.held_out:
            held_out.extend(samples[: None if most_held_out is None else most_held_out - len(held_out)])

    counts = scan(every, progress, keep)
    for dataset in every:
        if not lengths[dataset].any():
            require_trained(dataset)
    return counts, held_out, lengths
