"""The tables of docs/export.md: which client reads what, and how near it comes; what YaRN's rounding does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.common import RESULTS, ROOT

PAGE = ROOT / "docs" / "export.md"
MARKS = "<!-- {}: begin, made by python -m benchmarks.table -->", "<!-- {}: end -->"


def page(text: str) -> str:
    """docs/export.md with its tables made anew."""
    for name, lines in (("clients", client_lines()), ("yarn", yarn_lines())):
        begin, end = (mark.format(name) for mark in MARKS)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = "\n".join([before + begin, *lines, end + after])
    return text


def client_lines() -> Iterator[str]:
    """A line a client and format."""
    yield "| client | what it reads | asked for | bound | found | same answers | runs in |"
    yield "|---|---|---|---|---|---|---|"
    for one in _load("clients")["clients"]:
        found, versions = one["found"], one["versions"]
        package, version = next(iter(versions.items()))
        bound = ", ".join(_bound(name, value) for name, value in one["bounds"].items() if name in _BOUNDS)
        compared = f"{found['of']}" if "of" in found else "logits" if "positions" in found else "greedy answers"
        figures = [f"{_BOUNDS[name]} {_short(found[name])}" for name in ("max_abs", "kl") if name in found]
        same = f"{found['same']} of {found['prompts']}"
        same += f", {found['calls']} with calls" if "calls" in found else ""
        where = "tests, and " if one["tier"] == "fast" else ""
        yield (
            f"| {one['client']}: `{package}` {version} | {one['format']} | {compared} | {bound or '-'} "
            f"| {', '.join(figures) or '-'} | {same} | {where}`benchmarks.clients` |"
        )


def _note_lines(by_distance: list[dict[str, Any]]) -> Iterator[str]:
    """Whether what stands far back is found again."""
    if by_distance:
        yield ""
        yield "| the note stands back by tokens | ids | found again, and rounded | loss, and rounded | mean KL, nats |"
        yield "|---|---|---|---|---|"
    for one in by_distance:
        yield (
            f"| {one['from']:,} to {one['to']:,} | {one['positions']:,} | {one['hit']:.2%}, "
            f"{one['hit_rounded']:.2%} | {one['loss']:.4f}, {one['loss_rounded']:.4f} | {one['kl']:.1e} |"
        )


def yarn_lines() -> Iterator[str]:
    """By position, and the angles that are behind it; nothing where it wasn't measured."""
    if not (RESULTS / "yarn_truncate.json").is_file():
        return
    found = _load("yarn_truncate")
    yield "| positions | largest difference of two logits | mean KL, nats | same likeliest token | loss, and rounded |"
    yield "|---|---|---|---|---|"
    for one in found["by_position"]:
        yield (
            f"| {one['from']:,} to {one['to']:,} | {one['max_abs']:.2f} | {one['kl']:.1e} | {one['top1']:.2%} "
            f"| {one['loss']:.4f}, {one['loss_rounded']:.4f} |"
        )
    yield from _note_lines(found.get("by_distance", []))  # older results have none
    turned = found["rotations"]
    far = ", ".join(f"{radians:.2g} at {int(distance):,}" for distance, radians in turned["radians"].items())
    yield ""
    yield (
        f"Of the {turned['of']} frequencies {turned['frequencies_that_differ']} differ, by up to "
        f"{turned['largest_relative']:.0%}; the pair that is turned most differently is {far} tokens apart (radians)."
    )


_BOUNDS = {"max_abs": "max", "kl": "KL"}


def _bound(name: str, value: float) -> str:
    return f"{_BOUNDS[name]} {_short(value)}"


def _short(value: float) -> str:
    return f"{value:.0e}" if value in (1e-3, 5e-3) else f"{value:.1e}"


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())
