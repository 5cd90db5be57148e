"""Rows of a JSON Lines or JSON file, by number, without the file in memory.

A file of any size costs 12 bytes of RAM a row: where the row starts, and how long it is. Rows are read from disk when
they are asked for, in any order, so that a shuffle is a true shuffle of everything. Plain reads, not a memory map:
pages of a map count as resident memory of the process, and a file on a network disk that fails would kill it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ossia.errors import DataError, RunError
from ossia.harmony.openai_tools import MOST_LEVELS

Row = dict[str, Any]
_CHUNK_BYTES = 1 << 22
_LONGEST_BLANK = 16  # a line shorter than this is looked at when the index is made: it may hold only white space
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"\s*")
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FOREIGN = "\0foreign"  # the only key of an object that stands for a value of a type that JSON doesn't have


class Rows(Protocol):
    """Random access to the rows of one source."""

    @property
    def fingerprint(self) -> str:
        """Changes when the content does; a resumed run compares it."""
        ...

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user has to know of how these rows are read."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """The row as a JSON object; DataError with its place if it is none."""
        ...

    def where(self, index: int) -> str:
        """`file:line`, counted from 1."""
        ...

    def hashes(self, seed: int) -> NDArray[np.uint64]:
        """(len(self),) uint64, uniform, from each row's own bytes: equal rows have equal hashes wherever they stand."""
        ...


@dataclass(frozen=True, slots=True)
class TableValue:
    """A value of a table whose type JSON doesn't have: nothing that reads a row takes it for text or a number."""

    kind: str

    def __repr__(self) -> str:
        return f"<{self.kind}; store it as text>"


def foreign(value: object) -> dict[str, str]:
    """What stands in JSON text for such a value; `parse_json` makes a `TableValue` of it."""
    return {_FOREIGN: type(value).__name__}


def printable(text: str) -> str:
    """Text with control and direction characters, and halves of characters, as their escapes; lines stay lines."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return TableValue(row[_FOREIGN]) if _FOREIGN in row else row


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)


def parse_json(text: str, *, strict: bool = False) -> Any:
    """JSON text in which no object has a key twice.

    strict  whether NaN and Infinity, which Python writes and JSON doesn't have, are refused, and a value inside
            MOST_LEVELS others
    Raises  ValueError with a reason that fits behind a field's name
    """
    try:
        value = (_STRICT_DECODER if strict else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if strict and _is_deep(value):
        raise ValueError(f"nested too deeply: a value inside {MOST_LEVELS} others; make it flatter")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = list(chain.from_iterable(inside))
    return bool(level)


def row_hash(raw: bytes, seed: int) -> bytes:
    """8 uniform bytes that only the row's text and the seed decide."""
    return blake2b(raw.strip(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()


class _Stamp(NamedTuple):
    """Tells that a file was written to."""

    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True, eq=False)
class FileRows:
    """Rows that lie in one file as JSON text, one after the other.

    starts, sizes  (num_rows,) int64 and int32: the bytes of each row in `file`
    lines          (num_rows,) int32 line of each row, where that is not simply its number + 1
    name           what messages call the file; where `file` is an unpacked copy, `keep` is what keeps that alive
    """

    name: str
    file: Path
    starts: NDArray[np.int64]
    sizes: NDArray[np.int32]
    lines: NDArray[np.int32] | None
    checksum: int
    stamp: _Stamp
    remarks: tuple[str, ...] = ()
    keep: IO[bytes] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def fingerprint(self) -> str:
        """Number of rows and a checksum of the content."""
        return f"{len(self)} rows, crc32 {self.checksum:08x}"

    def where(self, index: int) -> str:
        """`file:line` of a row, counted from 1."""
        line = index + 1 if self.lines is None else int(self.lines[index])
        return f"{self.name}:{line}"

    def row(self, index: int) -> Row:
        """One row; DataError with its place if it is no JSON object."""
        with self._open() as handle:
            raw = os.pread(handle.fileno(), int(self.sizes[index]), int(self.starts[index]))
        return _parse(raw, self.where(index))

    def hashes(self, seed: int) -> NDArray[np.uint64]:
        """(num_rows,) uint64 of the rows' own bytes."""
        digests = bytearray()
        with self._open(_CHUNK_BYTES) as handle:
            for start, size in zip(self.starts, self.sizes, strict=True):  # as lists they'd be ten times the index
                handle.seek(int(start))
                digests += row_hash(handle.read(int(size)), seed)
        return np.frombuffer(digests, np.uint64)

    def _open(self, buffer_bytes: int = 0) -> IO[bytes]:
        """The file as it was indexed. Raises RunError, which no rule for bad rows skips, if it isn't that any more."""
        try:
            handle = open(self.file, "rb", buffering=buffer_bytes)  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise RunError(
                f"{self.name}: can't be read any more: {error.strerror}\n  next: resume when it can"
            ) from error
        if _Stamp.of(os.fstat(handle.fileno())) != self.stamp:
            handle.close()
            raise RunError(f"{self.name}: the file changed while it was in use\n  next: start again with the new one")
        return handle


def _parse(raw: bytes, where: str) -> Row:
    try:
        row = parse_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text at byte {error.start + 1} of the row") from error
    except ValueError as error:
        array = "; an array of rows goes into a .json file" if raw.removeprefix(_BOM).lstrip().startswith(b"[") else ""
        raise DataError(f"{where}: not valid JSON: {error}{array}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object {{...}} as the row, found {type(row).__name__}")
    return row


def index_lines(file: Path, name: str) -> FileRows:
    """Where each line of a JSON Lines file starts; blank lines are no rows.

    One pass over the file, a few MB of memory besides the index. Raises DataError if no row is there.
    """
    parts: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]] = []
    checksum, offset, num_lines, line_start = 0, 0, 0, 0
    with file.open("rb", buffering=0) as handle:
        stamp = _Stamp.of(os.fstat(handle.fileno()))
        head = os.pread(handle.fileno(), 3, 0)
        if head.startswith(_UTF16):
            raise DataError(f"{name}: UTF-16 text, expected UTF-8\n  next: iconv -f UTF-16 -t UTF-8")
        if head == _BOM:
            line_start = 3
        while chunk := handle.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset
            offset += len(chunk)
            if len(ends):
                starts = np.concatenate([[line_start], ends[:-1] + 1])
                parts.append(_used_lines(handle.fileno(), starts, ends - starts, num_lines, name))
                num_lines, line_start = num_lines + len(ends), int(ends[-1]) + 1
        last = np.array([line_start], np.int64)
        parts.append(_used_lines(handle.fileno(), last, offset - last, num_lines, name))
    starts, sizes, lines = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(starts):
        raise DataError(
            f"{name}: the file holds no rows\n  expected: at least one; in JSON Lines that is one JSON object a line"
        )
    without_blanks = lines[-1] == len(lines)
    return FileRows(name, file, starts, sizes, None if without_blanks else lines, checksum, stamp)


def _used_lines(
    descriptor: int, starts: NDArray[np.int64], sizes: NDArray[np.int64], num_before: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Starts, sizes and numbers of those lines that aren't blank; `num_before` lines came before them."""
    if sizes.max() > np.iinfo(np.int32).max:
        line = num_before + int(sizes.argmax()) + 1
        raise DataError(f"{name}:{line}: a row of {int(sizes.max()):,} bytes; the limit is 2 GiB")
    used = sizes > 0
    for line in np.flatnonzero(used & (sizes < _LONGEST_BLANK)):
        used[line] = bool(os.pread(descriptor, int(sizes[line]), int(starts[line])).strip())
    numbers = np.flatnonzero(used)
    return starts[numbers], sizes[numbers].astype(np.int32), (numbers + num_before + 1).astype(np.int32)


def index_json(file: Path, name: str) -> FileRows:
    """Rows of a `.json` file: the objects of an array, or JSON Lines if it doesn't begin with `[`. Raises DataError."""
    with file.open("rb") as handle:
        head = handle.read(_CHUNK_BYTES)
    if not head.removeprefix(_BOM).lstrip().startswith(b"["):
        return index_lines(file, name)
    return _index_array(file, name)


def _index_array(file: Path, name: str) -> FileRows:
    """Where each object of a JSON array lies. The text is in memory while this runs, not after."""
    stamp = _Stamp.of(file.stat())
    raw = file.read_bytes()
    byte = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        text = raw[byte:].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text at byte {error.start + byte + 1}") from error
    spans: list[tuple[int, int, int]] = []
    done, line = 0, 1  # `line` and `byte` are where the character `done` is
    for start, end in _array_elements(text, name):
        line += text.count("\n", done, start)
        byte += len(text[done:start].encode())
        size = len(text[start:end].encode())
        spans.append((byte, size, line))
        line += text.count("\n", start, end)
        byte, done = byte + size, end
    if not spans:
        raise DataError(f"{name}: the file holds no rows\n  expected: [{{...}}, {{...}}]")
    starts, sizes, lines = np.array(spans, np.int64).T
    return FileRows(name, file, starts, sizes.astype(np.int32), lines.astype(np.int32), zlib.crc32(raw), stamp)


def _array_elements(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Start and end of every element of the JSON array that `text` is."""
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return match.end()

    def fail(position: int, message: str) -> DataError:
        line = text.count("\n", 0, position) + 1
        return DataError(
            f"{name}:{line}: not valid JSON: {message} at column {position - text.rfind(chr(10), 0, position)}"
        )

    position = skip(skip(0) + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise fail(position, str(error)) from error
        yield position, end
        position = skip(end)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise fail(position, "expected ',' or ']'")
    if skip(position + 1) != len(text):
        raise fail(skip(position + 1), "text after the end of the array")


@dataclass(frozen=True, slots=True, eq=False)
class ChainedRows:
    """Several files one after the other; `firsts` (num_parts + 1,) int64 is the number of each part's first row.

    own_remarks  what a user has to know besides the parts' remarks
    """

    parts: tuple[Rows, ...]
    firsts: NDArray[np.int64]
    own_remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Rows], own_remarks: tuple[str, ...] = ()) -> ChainedRows:
        """The parts in this order."""
        return cls(tuple(parts), np.cumsum([0, *map(len, parts)]), own_remarks)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def fingerprint(self) -> str:
        """Number of rows and a checksum of the content."""
        return "; ".join(part.fingerprint for part in self.parts)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Its own and those of the parts, each once."""
        return tuple(dict.fromkeys([*self.own_remarks, *(line for part in self.parts for line in part.remarks)]))

    def row(self, index: int) -> Row:
        """One row; DataError with its place if it is no JSON object."""
        part, offset = self._locate(index)
        return part.row(offset)

    def where(self, index: int) -> str:
        """`file:line` of a row, counted from 1."""
        part, offset = self._locate(index)
        return part.where(offset)

    def hashes(self, seed: int) -> NDArray[np.uint64]:
        """(num_rows,) uint64 of the rows' own bytes."""
        return np.concatenate([part.hashes(seed) for part in self.parts])

    def _locate(self, index: int) -> tuple[Rows, int]:
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.parts[number], index - int(self.firsts[number])
