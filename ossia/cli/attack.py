"""`ossia attack`: cheats tried on an environment, and what came of each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossia.cli.app import importing
from ossia.errors import UserError

if TYPE_CHECKING:
    from ossia.rl.attacks import Report

_LINE_S = 10.0  # between two lines of progress


def attack(
    env: Annotated[str, typer.Argument(metavar="ENV", help="A name as in a recipe's `env`, or file.py:name.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the environment's.")
    ] = None,
    attacks: Annotated[
        list[Path] | None,
        typer.Option("--attacks", metavar="FOLDER", help="Also try those of your own: FOLDER/CLASS/NAME.txt."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--class", metavar="CLASS", help="Try those of this class alone.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Judge so many at a time; 1 where a clock decides the reward.")
    ] = 2,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one verdict.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the tasks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Try cheats on an environment. Each must earn nothing and touch nothing; exit code 1 if one did."""
    with importing():
        from ossia.rl.attacks import PROGRAMS, as_text, read_attacks
        from ossia.rl.attacks import attack as attack_env

    folders = (PROGRAMS, *(attacks or ()))
    kinds = list(dict.fromkeys(one.kind for one in read_attacks(folders)))
    if unknown := [name for name in kind or () if name not in kinds]:
        raise UserError(f"--class {unknown[0]}: no such class of attacks\n  allowed: {', '.join(kinds)}")
    with _progress() as told:
        report = attack_env(
            env,
            _options(option or ()),
            folders=folders,
            only=lambda one: not kind or one.kind in kind,
            workers=workers,
            seed=seed,
            timeout_s=timeout,
            told=lambda _, of: told(of),
        )
    print(json.dumps(_plain(report)) if as_json else as_text(report))
    if not report.held:
        sys.stdout.flush()
        raise SystemExit(1)


def _options(given: Sequence[str]) -> Mapping[str, Any]:
    """The environment's options, their values read as a recipe's."""
    from ossia.config.yaml_lines import parse_yaml

    found: dict[str, Any] = {}
    for text in given:
        name, equals, raw = text.partition("=")
        parsed = parse_yaml(raw)
        if not equals or not name or parsed.problems or name in found:
            raise UserError(f"--option {text}: expected: KEY=VALUE, each key once, such as --option size=4")
        found[name] = parsed.value
    return found


def _plain(report: Report) -> dict[str, Any]:
    """A report as JSON has it; attacks by name and path."""
    results = [
        asdict(result) | {"attack": result.attack.name, "path": str(result.attack.path), "held": result.held}
        for result in report.results
    ]
    return asdict(report) | {"results": results, "held": report.held}


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or a line now and then where that is no terminal; yields what to call after each attack with how
    many there are."""
    with importing():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    if not sys.stderr.isatty():
        done, said = 0, time.monotonic()

        def count(of: int) -> None:
            nonlocal done, said
            done += 1
            if time.monotonic() - said >= _LINE_S and done < of:
                said = time.monotonic()
                print(f"attacks: {done} of {of}", file=sys.stderr, flush=True)

        yield count
        return
    columns = (TextColumn("attacks"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("attacks", total=None)
        yield lambda of: bar.update(task, advance=1, total=of)
