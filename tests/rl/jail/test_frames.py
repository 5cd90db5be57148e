"""The parent's reader of frames: whatever bytes a program sends, a plain reply comes of them or a FrameError."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
import tracemalloc
from typing import Any

import pytest

from ossia.rl.jail.frames import HEADER, MOST_DEPTH, MOST_DIGITS, FrameError, Reply, decode, encode

NUMBER = 1  # which `true` equals
FRAMES = 100_000
SEEDS = (
    b'[1, "ok", 0, ""]',
    b'[1, "ok", [1, 2.5, null, true, "x"], ""]',
    b'[1, "ok", {"a": {"b": [[]]}}, ""]',
    b'[1, "ok", {"a": 1, "b": 2}, ""]',
    b'[1, "raised", null, "line 2: ValueError: x"]',
    b'[1, "memory", null, ""]',
    b'[1, "value", null, "TypeError"]',
    b'[1, "ok", "\\ud83d\\ude00 \xc3\xa9", ""]',
    b'[1, "ok", -1.5e-300, ""]',
)
TOKENS = (
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"null", b"true", b"1", b"1.0", b"-", b"1e999", b"NaN",
    b"Infinity", b"-Infinity", b"9" * 1001, b"1." + b"0" * 80, b"0x1", b"1_0", b"'", b"//", b"\\ud800",
b"\\udfff", b"\\u0000", b"\x00", b"\xff", b"\xed\xa0\x80",
    b'"ok"', b'"a": 1, "a": 2', b"[" * 70, b"]" * 70, b'{"":' * 40, b" ", b"\n", b"\xef\xbb\xbf",
)  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """A frame's bytes: a good one with up to eight bites, swaps and insertions, or nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(64))
    if rng.random() < 0.1:
        return b"".join(rng.choices(TOKENS, k=rng.randrange(1, 30)))
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(9)):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0:
                data[place:place] = rng.choice(TOKENS)
            case 1:
                del data[place : place + rng.randrange(1, 6)]
            case 2 if place < len(data):
                data[place] = rng.randrange(256)
            case 3:
                data[place:place] = data[place : place + rng.randrange(1, 20)]
            case 4:
                data[: data.find(b",")] = rng.choice((b"[true", b"[1.0", b"[1e0", b"[-1", b'["1"', b"[01"))
            case 5:
                data = data.replace(b'"b"', b'"a"')
            case _:
                other = rng.choice(SEEDS)
                data[place:] = other[min(place, len(other)) :]
    return bytes(data)


def assert_plain(value: Any, depth: int = 0) -> None:
    """By other means than the reader's own."""
    assert depth <= MOST_DEPTH
    kind = type(value)
    assert kind in (bool, int, float, str, list, dict, type(None))
    if kind is int:
        assert abs(value) < 10**MOST_DIGITS
    elif kind is float:
        assert math.isfinite(value)
    elif kind is str:
        value.encode("utf-8")
    elif kind is list:
        for item in value:
            assert_plain(item, depth + 1)
    elif kind is dict:
        for key, item in value.items():
            assert type(key) is str
            key.encode("utf-8")
            assert_plain(item, depth + 1)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_a_hundred_thousand_forged_frames_are_plain_replies_or_refused() -> None:
    rng = random.Random(0)
    replies, reasons = 0, set()
    for _ in range(FRAMES):
        body = mutated(rng)
        try:
            reply = decode(body, NUMBER)
        except FrameError as error:
            reasons.add(str(error).split(":")[0])
            continue
        replies += 1
        assert type(reply) is Reply
        assert reply.kind in ("ok", "raised", "memory", "value")
        assert type(reply.detail) is str
        assert_plain(reply.value)
        assert_plain(reply.detail)
        told = json.loads(body, object_pairs_hook=each_once)
        assert told == [NUMBER, reply.kind, reply.value, reply.detail]
        assert type(told[0]) is int
    assert replies > FRAMES / 20  # it isn't all noise
    assert {"it isn't UTF-8", "it isn't plain JSON", "it isn't a list of four"} <= reasons
    assert len(reasons) >= 6


LARGE = {
    "brackets that are never closed": b"[" * (1 << 20),
    "brackets that are": b'[1,"ok",' + b"[" * 500_000 + b"]" * 500_000 + b',""]',
    "dicts in each other": b'[1,"ok",' + b'{"a":' * 150_000,
    "one long list": b'[1,"ok",[' + b"0," * 500_000 + b'0],""]',
    "one long text": b'[1,"ok","' + b"\\u0000" * 170_000 + b'",""]',
    "halves of pairs": b'[1,"ok","' + b"\\ud800" * 170_000 + b'",""]',
    "one long number": b'[1,"ok",' + b"9" * (1 << 20) + b',""]',
    "one long fraction": b'[1,"ok",0.' + b"9" * (1 << 20) + b',""]',
    "many keys": b'[1,"ok",{' + b",".join(b'"%d":0' % n for n in range(100_000)) + b'},""]',
    "keys that collide": b'[1,"ok",{' + b",".join(b'"a":0' for _ in range(170_000)) + b'},""]',
    "lists, many and flat": b'[1,"ok",[' + b"[]," * 300_000 + b'[]],""]',
    "blanks": b" " * (1 << 20),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_frame_as_large_as_may_be_costs_little_time_and_memory(what: str) -> None:
    body = LARGE[what]
    start = time.process_time()
    with contextlib.suppress(FrameError):
        decode(body, NUMBER)
    assert time.process_time() - start < 5.0  # 0.07 alone; a large process collects its garbage
    tracemalloc.start()
    with contextlib.suppress(FrameError):
        decode(body, NUMBER)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 << 20


def test_what_one_side_writes_the_other_reads() -> None:
    for value in (0, [[{"a": [1.5, None, True, "é"]}]], -(10**999), "", {}):
        frame = encode([NUMBER, "ok", value, ""])
        assert HEADER.unpack_from(frame)[0] == len(frame) - HEADER.size
        assert decode(frame[HEADER.size :], NUMBER) == Reply("ok", value, "")


def test_depth_is_allowed_up_to_its_limit_and_no_further() -> None:
    def nested(depth: int) -> bytes:
        return b'[1,"ok",' + b"[" * depth + b"]" * depth + b',""]'

    assert_plain(decode(nested(MOST_DEPTH), NUMBER).value)
    with pytest.raises(FrameError, match="deeper"):
        decode(nested(MOST_DEPTH + 1), NUMBER)
