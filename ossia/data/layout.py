"""Row layouts of the field: which one a source has.

A layout is recognised by its columns and never guessed: rows that fit two layouts, or files that mix them, are refused
with the names to choose from. Columns that no layout knows are counted by the caller, not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ossia.config.schema import DataSourceConfig, HarmonyConfig
from ossia.data.rows import Row, Rows, printable
from ossia.errors import DataError, RecipeError
from ossia.harmony.chat import THINKING

_SETTINGS = ("tools", "developer", "reasoning_effort", "current_date", "identity", "knowledge_cutoff", "builtin_tools")
_EXTRA = {  # fields that a layout may have besides those it is recognised by
    "messages": (*_SETTINGS, "system"),
    "sharegpt": (*_SETTINGS, "system"),
    "alpaca": (*_SETTINGS, "system", "input", *THINKING),
    "prompt": (*_SETTINGS, "system", *THINKING),
    "text": (),
    "tokens": ("targets", "roles", "channels", "source"),
}
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("ids", "weights"),
}
FIELDS = tuple(sorted({name for table in (REQUIRED, _EXTRA) for names in table.values() for name in names}))
_NUM_PROBES = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one source are read.

    format    messages | sharegpt | alpaca | prompt | text | tokens
    columns   field -> the file's own name for it, where that differs
    source, harmony  what a row doesn't say itself
    """

    format: str
    columns: dict[str, str]
    source: DataSourceConfig
    harmony: HarmonyConfig

    def fields(self, row: Row) -> Row:
        """The row under Ossia's field names; null is the same as absent."""
        renamed = {name: row[column] for name, column in self.columns.items() if column in row}
        if renamed:
            row = {name: value for name, value in row.items() if name not in self.columns.values()} | renamed
        return {name: value for name, value in row.items() if value is not None}

    def name(self, field: str) -> str:
        """What the file calls a field."""
        return self.columns.get(field, field)

    def ignored(self, row: Row) -> tuple[str, ...]:
        """Columns of the row that are not used."""
        used = {self.name(field) for field in (*REQUIRED[self.format], *_EXTRA[self.format])}
        return tuple(row.keys() - used)

    def has_null_arguments(self, row: Row) -> bool:
        """Whether the arguments of a tool call in the row, a good one, are an object with a null in it."""
        if self.format not in ("messages", "sharegpt", "prompt"):
            return False
        lists = [row.get(self.name(field)) for field in REQUIRED[self.format]]
        messages = [message for found in lists if isinstance(found, list) for message in found]
        calls = [call for message in messages if isinstance(message, dict) for call in message.get("tool_calls") or ()]
        functions = [call.get("function") or call for call in calls if isinstance(call, dict)]
        return any(_holds_null(found.get("arguments")) for found in functions if isinstance(found, dict))


# --- recognising ------------------------------------------------------------------------------------------------------


def recognise(rows: Rows, source: DataSourceConfig, harmony: HarmonyConfig) -> tuple[Layout, str]:
    """The layout of a source, and in words what told it: named by the recipe, or seen in rows from all over the source.

    Raises  DataError if rows fit no layout, several, or not all the same; RecipeError for a column that doesn't exist
    """
    probes = list(_probe(rows)) or [_first(rows)]
    _check_columns(source, probes)
    if source.format != "auto":
        return Layout(source.format, source.columns, source, harmony), "named in the recipe"
    found: dict[str, str] = {}  # layout -> first place it was seen
    unknown: dict[str, list[str]] = {}
    for where, row in probes:
        names = _candidates(Layout("", source.columns, source, harmony).fields(row))
        if len(names) > 1:
            raise DataError(
                f"{where}: the row fits the formats {' and '.join(names)}\n"
                f"  next: name one for {source.path}: format: {names[0]}"
            )
        if names:
            found.setdefault(names[0], where)
        else:
            unknown[where] = sorted(map(printable, row))
    if len(found) > 1:
        seen = ", ".join(f"{name} at {where}" for name, where in found.items())
        raise DataError(
            f"{source.path}: rows of different formats: {seen}\n  next: put each format into its own source"
        )
    if not found:
        where, names = next(iter(unknown.items()))
        allowed = "; ".join(f"{name}: {' + '.join(columns)}" for name, columns in REQUIRED.items())
        raise DataError(
            f"{where}: the format isn't known from the columns {', '.join(names) or '(it has none)'}\n"
            f"  expected: {allowed}\n"
            "  next: name your columns in the recipe, for example columns: {messages: YOUR_COLUMN}"
        )
    name = next(iter(found))
    if name == "messages" and "messages" not in source.columns and _is_renamed(probes):
        columns = {**source.columns, "messages": "conversations"}
        return Layout(name, columns, source, harmony), "recognised by conversations with role and content"
    return Layout(name, source.columns, source, harmony), f"recognised by {', '.join(REQUIRED[name])}"


def _probe(rows: Rows) -> Iterator[tuple[str, Row]]:
    """Some of the first rows and some from all over; rows that aren't JSON are left for the reading to report."""
    spread = np.linspace(0, len(rows) - 1, _NUM_PROBES).astype(int).tolist()
    for index in sorted({*range(min(_NUM_PROBES, len(rows))), *spread}):
        try:
            yield rows.where(index), rows.row(index)
        except DataError:
            continue


def _first(rows: Rows) -> tuple[str, Row]:
    """The first row of a source in which no row that was looked at can be read: raises why."""
    try:
        return rows.where(0), rows.row(0)
    except DataError as error:
        allowed = "one JSON object a line, or in a .json file an array of them: [{...}, {...}]"
        raise DataError(
            f"{error}\n  expected: {allowed}\n  next: mend the file; no row that was looked at is right"
        ) from error


def _candidates(fields: Row) -> list[str]:
    names = [name for name, required in REQUIRED.items() if all(field in fields for field in required)]
    if "sharegpt" in names and _has_roles(fields["conversations"]):
        names[names.index("sharegpt")] = "messages"
    return list(dict.fromkeys(names))


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


def _is_renamed(probes: list[tuple[str, Row]]) -> bool:
    return any("messages" not in row and _has_roles(row.get("conversations")) for _, row in probes)


def _check_columns(source: DataSourceConfig, probes: list[tuple[str, Row]]) -> None:
    for name, column in source.columns.items():
        if name not in FIELDS:
            raise RecipeError(f"data.columns: unknown field `{name}`\n  allowed: {', '.join(FIELDS)}")
        others = [other for other, taken in source.columns.items() if taken == column and other != name]
        if others:
            raise RecipeError(
                f"data.columns.{name}: the column `{column}` is {others[0]} already; a column is one field"
            )
        if probes and not any(column in row for _, row in probes):
            seen = sorted({printable(key) for _, row in probes for key in row})
            raise RecipeError(
                f"data.columns.{name}: {source.path} has no column `{column}`\n  found: {', '.join(seen)}"
            )


def _holds_null(value: Any) -> bool:
    """Whether an object in `value` has a member that is null."""
    if isinstance(value, dict):
        return any(item is None or _holds_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_holds_null, value))
