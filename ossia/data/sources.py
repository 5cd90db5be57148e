"""Where rows come from: a file, a folder of files, or a dataset on the Hugging Face hub.

What has no lines to jump to (Parquet, gzip) is unpacked once into a temporary JSON Lines file and read from there: a
seeded shuffle reads rows in any order, and a Parquet row group would be decoded again for every single one.
Tables (Parquet, a hub dataset) give every object of a column all the members that any of them has, null where it has
none. Which nulls were there before nobody can tell, so all of them are read as absent, and where that may change what a
model learns to write, in the arguments of tool calls, the user is told.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ossia.config import is_hub_name
from ossia.data.rows import (
    ChainedRows,
    FileRows,
    Row,
    Rows,
    TableValue,
    foreign,
    index_json,
    index_lines,
    printable,
    row_hash,
)
from ossia.errors import DataError, MissingExtraError, first_few

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet")
_PACKED = (".zst", ".bz2", ".xz", ".zip", ".gz")
_CHUNK_BYTES = 1 << 22


def open_rows(path: str, split: str = "train") -> Rows:
    """The rows of a file, of every data file below a folder, or of a dataset on the Hugging Face hub.

    split   of a hub dataset only
    Raises  DataError if there is no such file, it holds no rows, or its kind is unknown; MissingExtraError
    """
    place, name = Path(path).expanduser(), printable(path)
    try:
        if place.is_dir():
            return _open_folder(place, name)
        if place.is_file():
            return _open_file(place, name)
        if place.exists():
            raise _no_file(name)
    except OSError as error:
        found = printable(str(error.filename or path))
        raise DataError(f"{found}: can't be read: {error.strerror or error}\n  next: mend or remove it") from error
    if is_hub_name(path) and not path.endswith(SUFFIXES):
        return _open_hub(path, split)
    raise DataError(
        f"{path}: no such data file or folder\n"
        f"  allowed: a file ({', '.join(SUFFIXES)}), a folder of these, or a hub dataset as OWNER/NAME"
    )


def _open_folder(folder: Path, name: str) -> Rows:
    """Every data file below a folder, in the order of their names; hidden ones are left out, others are told."""
    files, others = [], []
    for file in sorted(_files_below(folder)):
        relative = file.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts):
            (files if file.name.endswith(SUFFIXES) else others).append(relative)
    told = ", ".join(first_few([printable(str(other)) for other in others]))
    if not files:
        raise DataError(
            f"{name}: no data file in this folder{f', only {told}' if others else ''}\n"
            f"  expected: files ending in {', '.join(SUFFIXES)}"
        )
    remarks = (f"not read, because no data file ends so: {told}",) if others else ()
    for relative in files:
        if (folder / relative).exists() and not (folder / relative).is_file():
            raise _no_file(os.path.join(name, printable(str(relative))))
    parts = [_open_file(folder / relative, os.path.join(name, printable(str(relative)))) for relative in files]
    return ChainedRows.of(parts, remarks)


def _no_file(name: str) -> DataError:
    return DataError(f"{name}: neither a file nor a folder\n  next: write its rows into a file first")


def _files_below(folder: Path) -> Iterator[Path]:
    """What isn't a folder, in the folders below too, and behind links to folders, each once. Raises OSError."""

    def stop(error: OSError) -> None:
        raise error

    seen = {folder.resolve()}
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders.sort()
        for name in list(folders):
            real = Path(place, name).resolve()
            if real in seen:
                folders.remove(name)
            seen.add(real)
        yield from (Path(place, name) for name in names)


def _open_file(file: Path, name: str) -> Rows:
    if file.name.endswith((".jsonl", ".ndjson")):
        return index_lines(file, name)
    if file.name.endswith(".json"):
        return index_json(file, name)
    if file.name.endswith(".jsonl.gz"):
        return _unpacked(name, _gzip_chunks(file, name))
    if file.name.endswith(".parquet"):
        return _open_parquet(file, name)
    next_step = "unpack it first" if file.name.endswith(_PACKED) else "convert it, or rename it"
    raise DataError(f"{name}: unknown kind of data file\n  allowed: {', '.join(SUFFIXES)}\n  next: {next_step}")


def _unpacked(name: str, chunks: Iterator[bytes]) -> FileRows:
    """JSON Lines in a temporary file that lives as long as the rows do."""
    copy = tempfile.NamedTemporaryFile(prefix="ossia-rows-", suffix=".jsonl")  # noqa: SIM115 - closed with the rows
    for chunk in chunks:
        try:
            copy.write(chunk)
            copy.flush()
        except OSError as error:
            raise DataError(
                f"{name}: can't be unpacked into {tempfile.gettempdir()}: {error.strerror}\n"
                "  next: make room there, or set TMPDIR to a folder with more"
            ) from error
    return replace(index_lines(Path(copy.name), name), keep=copy)


def _gzip_chunks(file: Path, name: str) -> Iterator[bytes]:
    try:
        with gzip.open(file, "rb") as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: not a whole gzip file: {error}\n  next: pack it again, or rename it") from error


def _open_parquet(file: Path, name: str) -> FileRows:
    try:
        from pyarrow import ArrowInvalid, ArrowNotImplementedError
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError(f"{name}: reading Parquet needs pyarrow: pip install 'ossia[data]'") from error
    try:
        with ParquetFile(file) as parquet:
            _check_names(parquet.schema_arrow, name)
            batches = (batch.to_pylist() for batch in parquet.iter_batches(batch_size=1024))
            rows = _unpacked(name, (b"".join(map(_json_line, batch)) for batch in batches))
            return replace(rows, remarks=_remarks(parquet.schema_arrow))
    except (ArrowInvalid, ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{name}: not a Parquet file that can be read: {error}\n  next: write it again") from error


def _check_names(fields: Iterable[pyarrow.Field], name: str) -> None:
    """Raise DataError for two columns, at any depth, of one name: of a row only the last would be left."""
    members = list(fields)
    names = [member.name for member in members]
    for member in members:
        if names.count(member.name) > 1:
            raise DataError(f"{name}: two columns are called {member.name!r}\n  next: rename or drop one of them")
        _check_names(_members(member.type), name)


def _json_line(row: Row) -> bytes:
    """An Arrow row; values for which JSON has no type are marked, and read back as `TableValue`."""
    return json.dumps(_without_nulls(row), ensure_ascii=False, default=foreign).encode() + b"\n"


def _without_nulls(value: Any) -> Any:
    """Objects without their null members: Arrow gives every object of a column every member that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _marked(value: Any) -> Any:
    """A value without nulls whose parts that JSON has no type for are `TableValue`, as they are in a Parquet file."""
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item) for item in value]
    return value if isinstance(value, str | int | float | None) else TableValue(type(value).__name__)


def _remarks(schema: pyarrow.Schema) -> tuple[str, ...]:
    """A word about nulls, if the arguments of tool calls are objects of the table."""
    if not _has_struct("arguments", schema):
        return ()
    return (
        "the arguments of its tool calls are columns of a table, in which a null can't be told from an absent key: "
        "nulls are read as absent (to keep them, store arguments as JSON text)",
    )


def _has_struct(name: str, fields: Iterable[pyarrow.Field]) -> bool:
    """Whether a field of this name, at any depth, holds objects."""
    members = [(member.name, _members(member.type)) for member in fields]
    return any(inner and (found == name or _has_struct(name, inner)) for found, inner in members)


def _members(kind: pyarrow.DataType) -> list[pyarrow.Field]:
    """The fields of a type of objects, or of lists of objects; none of any other."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return list(kind) if types.is_struct(kind) else []


class HubFeatures(Protocol):
    """What is used of a `datasets.Features`."""

    @property
    def arrow_schema(self) -> pyarrow.Schema: ...


class HubTable(Protocol):
    """What is used of a `datasets.Dataset`."""

    @property
    def features(self) -> HubFeatures: ...
    @property
    def _fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows of a `datasets.Dataset`, which keeps them in a memory-mapped Arrow file."""

    name: str
    table: HubTable

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user has to know of how these rows are read."""
        return _remarks(self.table.features.arrow_schema)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """Number of rows and a checksum of the content."""
        return f"{len(self)} rows, arrow {self.table._fingerprint}"

    def where(self, index: int) -> str:
        """`file:line` of a row, counted from 1."""
        return f"{self.name}:{index + 1}"

    def row(self, index: int) -> Row:
        """One row; DataError with its place if it is no JSON object."""
        row: Row = _marked(_without_nulls(self.table[index]))
        return row

    def hashes(self, seed: int) -> NDArray[np.uint64]:
        """(num_rows,) uint64 of the rows' own bytes."""
        digests = b"".join(row_hash(_json_line(self.table[index]), seed) for index in range(len(self)))
        return np.frombuffer(digests, np.uint64)


def _open_hub(name: str, split: str) -> Rows:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise MissingExtraError(
            f"{name}: no such file; to load it from the Hugging Face hub: pip install 'ossia[hub]'"
        ) from error
    print(f"{name}: not a file or folder here; asking the Hugging Face hub for it", file=sys.stderr, flush=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of each of its attempts; what came of them is told below
    try:
        table = load_dataset(name, split=split)
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name}: neither a file or folder here, nor a hub dataset with a split `{split}` that loads: {reason}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not len(table):
        raise DataError(f"{name}: split `{split}` holds no rows")
    return HubRows(f"{name}/{split}", table)
