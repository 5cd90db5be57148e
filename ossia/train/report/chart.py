"""A line chart as HTML with inline SVG: no script, no library, readable at any width, in light and dark, and in print.

The drawing stretches with the page, so its lines are told not to scale and its words stand beside it as HTML; pointing
at a stretch of steps shows its numbers, and a table under the chart holds them for those who can't point.
Own code because the page must open anywhere, years from now, without a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 1000, 300
_MOST_BUCKETS, _MOST_ROWS = 200, 25


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (step, value) by rising step. `sparse` ones are few and get a mark at each point."""

    name: str
    points: Sequence[tuple[int, float]]
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring points drawn as one: the steps they span, their mean, lowest and highest value."""

    first: int
    last: int
    mean: float
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2

    def steps(self) -> str:
        """The steps in words: `7` or `1–10`."""
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,}–{self.last:,}"


def buckets(points: Sequence[tuple[int, float]], most: int) -> list[Bucket]:
    """At most `most` buckets of equally many neighbouring points (the last may hold fewer)."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    found = []
    for group in groups:
        values = [value for _, value in group]
        found.append(Bucket(group[0][0], group[-1][0], math.fsum(values) / len(values), min(values), max(values)))
    return found


def nice_ticks(low: float, high: float, *, about: int = 4, whole: bool = False) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from at most `low` to at least `high`.

    whole  only whole numbers: for steps
    """
    if high <= low:
        high = low + (abs(low) / 2 or 1.0)
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    gap = next(
        magnitude * m for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if magnitude * m >= rough * 0.999
    )
    gap = max(gap, 1.0) if whole else gap
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [n * gap for n in range(first, last + 1)]


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with just the decimals that tell the ticks apart."""
    gap = ticks[1] - ticks[0]
    decimals = next((d for d in range(12) if abs(round(gap, d) - gap) < gap * 1e-6), 12)
    return f"{tick:,.{decimals}f}"


def chart_html(title: str, unit: str, series: Sequence[Series], *, from_zero: bool) -> str:
    """A `<figure>` with the curves over the steps.

    unit       what the numbers are, under the title
    series     at least one of them with a point; the first is drawn as a line with the range of each bucket behind it
    from_zero  whether the axis starts at 0; else it starts near the lowest value
    """
    drawn = [(one, buckets(one.points, _MOST_BUCKETS)) for one in series if one.points]
    values = [edge for _, found in drawn for bucket in found for edge in (bucket.low, bucket.high)]
    ticks = nice_ticks(min(0.0, *values) if from_zero else min(values), max(values))
    last_step = max(1, *(found[-1].last for _, found in drawn))
    scale = _Scale(last_step, ticks[0], ticks[-1])
    name = "chart-" + "".join(c if c.isalnum() else "-" for c in title.lower())
    curves = "".join(_curve(one, found, scale, number) for number, (one, found) in enumerate(drawn))
    grid = "".join(f'<path class="grid" d="M0 {scale.y(tick):.1f}H{WIDTH}"/>' for tick in ticks)
    steps = [tick for tick in nice_ticks(0, last_step, about=5, whole=True) if tick <= last_step]
    y_words = "".join(f'<span style="top:{scale.y(t) / HEIGHT:.2%}">{tick_text(t, ticks)}</span>' for t in ticks)
    x_words = "".join(f'<span style="left:{scale.x(tick) / WIDTH:.2%}">{tick:,.0f}</span>' for tick in steps)
    legend = "".join(f'<span class="key c{n}">{escape(one.name)}</span>' for n, (one, _) in enumerate(drawn))
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><span class="unit">{escape(unit)}</span>'
        f'<span class="legend">{legend if len(drawn) > 1 else ""}</span></figcaption>\n'
        f'<div class="plot"><div class="y" aria-hidden="true">{y_words}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-labelledby="{name}">'
        f'<title id="{name}">{escape(_in_words(title, unit, drawn))}</title>\n'
        f"{grid}{curves}{_hover(drawn, scale)}</svg>"
        f'<div class="x" aria-hidden="true">{x_words}</div><div class="axis" aria-hidden="true">step</div></div>\n'
        f"{_table(title, [one for one, _ in drawn])}</figure>\n"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where a step and a value lie in the drawing."""

    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return step / self.last_step * WIDTH

    def y(self, value: float) -> float:
        return (self.high - value) / (self.high - self.low) * HEIGHT


def _curve(one: Series, found: Sequence[Bucket], scale: _Scale, number: int) -> str:
    """The range of each bucket, the line through the means, and marks where the points are few."""
    line = "L".join(f"{scale.x(b.middle):.1f} {scale.y(b.mean):.1f}" for b in found)
    drawing = f'<path class="line c{number}" d="M{line}"/>'
    if one.sparse or len(found) == 1:
        dots = "".join(f"M{scale.x(b.middle):.1f} {scale.y(b.mean):.1f}h0" for b in found)
        drawing += f'<path class="dots c{number}" d="{dots}"/>'
    if any(b.low < b.high for b in found):
        over = "L".join(f"{scale.x(b.middle):.1f} {scale.y(b.high):.1f}" for b in found)
        under = "L".join(f"{scale.x(b.middle):.1f} {scale.y(b.low):.1f}" for b in reversed(found))
        drawing = f'<path class="range c{number}" d="M{over}L{under}Z"/>' + drawing
    return drawing


def _hover(drawn: Sequence[tuple[Series, Sequence[Bucket]]], scale: _Scale) -> str:
    """For each bucket of each curve a strip that names its numbers; sparse curves on top, and narrow."""
    strips = []
    for number, (one, found) in enumerate(drawn):
        edges = [(a.middle + b.middle) / 2 for a, b in pairwise(found)]
        for bucket, left, right in zip(found, [0.0, *edges], [*edges, float(scale.last_step)], strict=True):
            x, y, start, end = scale.x(bucket.middle), scale.y(bucket.mean), scale.x(left), scale.x(right)
            if one.sparse:
                start, end = max(start, x - 8), min(end, x + 8)
            strips.append(
                f"<g><title>{escape(_numbers(one, bucket))}</title>"
                f'<rect x="{start:.1f}" width="{end - start:.1f}" height="{HEIGHT}"/>'
                f'<path class="dots c{number}" d="M{x:.1f} {y:.1f}h0"/></g>'
            )
    return f'<g class="hover">{"".join(strips)}</g>\n'


def _numbers(one: Series, bucket: Bucket) -> str:
    spread = "" if bucket.low == bucket.high else f" on average ({bucket.low:.5g} to {bucket.high:.5g})"
    plural = "step" if bucket.first == bucket.last else "steps"
    return f"{plural} {bucket.steps()}: {one.name} {bucket.mean:.5g}{spread}"


def _in_words(title: str, unit: str, drawn: Sequence[tuple[Series, Sequence[Bucket]]]) -> str:
    """What a reader of the screen hears in place of the picture."""
    told = [f"{one.name} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one, _ in drawn]
    return f"{title} ({unit}): {'; '.join(told)}, up to step {max(found[-1].last for _, found in drawn):,}"


def _table(title: str, series: Sequence[Series]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.name)}</td><td>{b.steps()}</td><td>{b.mean:.5g}</td><td>{b.low:.5g}</td>"
        f"<td>{b.high:.5g}</td></tr>"
        for one in series
        for b in buckets(one.points, _MOST_ROWS)
    )
    return (
        f"<details><summary>Numbers</summary><div class=scroll><table><caption>{escape(title)}</caption><thead><tr>"
        "<th>curve</th><th>steps</th><th>mean</th><th>lowest</th><th>highest</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )
