"""A report of attacks, for a reader: a line a class, then each that got through, with its program's path."""

from __future__ import annotations

from collections.abc import Sequence

from ossia.rl.attacks.run import Report, Result

_COLUMNS = ("class", "tried", "earned", "touched", "broke", "not run")


def as_text(report: Report) -> str:
    """The table, what each attack that got through did, and the sum of it."""
    kinds: dict[str, list[Result]] = {}
    for result in report.results:
        kinds.setdefault(result.attack.kind, []).append(result)
    rows = [_COLUMNS, *(_row(kind, results) for kind, results in kinds.items()), _row("all", report.results)]
    lines = [
        f"env {report.env}: {report.target}; jail: {', '.join(report.levels) or 'none'}",
        f"an honest answer earns {report.honest:g}, an honest failure {report.failure:g}",
        "",
        *("".join([f"{row[0]:<12}", *(f"{cell:>9}" for cell in row[1:])]) for row in rows),
        "",
    ]
    for result in report.results:
        if not result.held:
            lines += _told(result)
    lines += _left_out(report.results)
    through = sum(not result.held for result in report.results)
    tried = sum(result.run for result in report.results)
    lines.append(f"{through} of {tried} attacks got through" if through else f"none of {tried} attacks got through")
    return "\n".join(lines)


def _row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    counts = (
        sum(result.run for result in results),
        sum(result.earned for result in results),
        sum(bool(result.touched) for result in results),
        sum(result.broke for result in results),
        sum(not result.run for result in results),
    )
    return (name, *map(str, counts))


def _told(result: Result) -> list[str]:
    lines = [f"{result.attack.name}: {result.attack.tries}"]
    if result.earned:
        lines.append(f"  earned {result.reward:g}")
    lines += [f"  {what}" for what in result.touched]
    if result.broke:
        lines.append(f"  after it an honest answer earned {result.honest:g}")
    if result.failed:
        lines.append(f"  {result.failed.splitlines()[-1]}")
    if result.task:
        lines.append(f"  task: {result.task[:100]}")
    return [*lines, f"  {result.attack.path}", ""]


def _left_out(results: Sequence[Result]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for result in results:
        if not result.run:
            reasons.setdefault(result.failed, []).append(result.attack.name)
    return [f"not run, {why}: {', '.join(names)}" for why, names in reasons.items()]
