"""Plain values as frames: what crosses between a jail's parent and the program in it, and how little of it is believed.

```text
frame  = 4 bytes, length, big-endian | that many bytes of JSON
sent   = [number, op, ...]
reply  = [number, kind, value, detail]     kind: "ok" | "raised" | "memory" | "value"
```
The reader decides by the bytes alone: whatever else a program does to its end of the channel, its reply is a value of
`Plain`, or no reply.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

HEADER = struct.Struct("!I")
MOST_DEPTH = 64  # lists and dicts in each other
MOST_DIGITS = 1000  # of an int: what a program may make of it in the parent costs microseconds
_MOST_FLOAT_CHARACTERS = 64
_MOST_DETAIL = 4000
_KINDS = ("ok", "raised", "memory", "value")


class FrameError(Exception):
    """Bytes that are no reply; the message says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a program answered."""

    kind: str
    value: Plain
    detail: str


def encode(parts: list[Any]) -> bytes:
    """A frame of plain values.

    Raises TypeError or ValueError where one isn't plain: another type (a tuple too), NaN, an infinity, half a
    surrogate, an int of more than MOST_DIGITS digits, more than MOST_DEPTH levels.
    """
    _check(parts)
    body = json.dumps(parts, allow_nan=False).encode("ascii")
    return HEADER.pack(len(body)) + body


def decode(body: bytes, number: int) -> Reply:
    """The reply to request `number` that a frame's bytes are. Raises FrameError."""
    try:
        parts = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise FrameError("it isn't UTF-8") from None
    except RecursionError:
        raise FrameError(f"it nests deeper than {MOST_DEPTH}") from None
    except ValueError as error:  # also JSONDecodeError
        raise FrameError(f"it isn't plain JSON: {error}") from None
    if type(parts) is not list or len(parts) != 4:
        raise FrameError("it isn't a list of four")
    told, kind, value, detail = parts
    if type(told) is not int or told != number:
        raise FrameError(f"it doesn't answer request {number}")
    if type(kind) is not str or kind not in _KINDS or type(detail) is not str or len(detail) > _MOST_DETAIL:
        raise FrameError("its kind or detail isn't one of ours")
    if body.count(b"[") + body.count(b"{") > MOST_DEPTH or b"\\ud" in body.lower():
        try:
            _check(parts)
        except ValueError as error:
            raise FrameError(str(error)) from None
    return Reply(kind, value, detail)


def _check(value: Any) -> None:
    """Raise TypeError or ValueError unless a value is plain; without recursion."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is list:
                below += item
            elif kind is dict:
                below += item.keys()
                below += item.values()
                if any(type(key) is not str for key in item):
                    raise TypeError("a dict's key isn't a str")
            elif kind is str:
                if not item.isascii():
                    _encodable(item)
            elif kind is float:
                if not math.isfinite(item):
                    raise ValueError(f"{item} isn't a finite number")
            elif kind is int:
                if item.bit_length() > MOST_DIGITS * math.log2(10):
                    raise ValueError(f"an int of more than {MOST_DIGITS:,} digits")
            elif kind is not bool and item is not None:
                raise TypeError(f"{kind.__name__} isn't a plain type")
        level, depth = below, depth + 1
        if depth > MOST_DEPTH + 1:
            raise ValueError(f"it nests deeper than {MOST_DEPTH}")


def _encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a str with half of a surrogate pair") from None


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"an int of more than {MOST_DIGITS:,} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits) if len(digits) <= _MOST_FLOAT_CHARACTERS else math.inf
    if not math.isfinite(value):
        raise ValueError("a number that isn't finite, or too long")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} isn't a finite number")


def _dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key twice")
    return made


_DECODER = json.JSONDecoder(
    parse_int=_int, parse_float=_float, parse_constant=_constant, object_pairs_hook=_dict, strict=True
)
