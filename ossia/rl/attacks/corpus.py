"""The attacks: one file each, `CLASS/NAME.txt`.

```text
# One sentence that says what it tries.
# for: any                what it attacks, see INTERFACES; another word is the name of a function
# harms: yes              where code that isn't jailed it would hurt the machine: then it is left out
# at most: honest         it is right, and may earn as much as the environment's own right answer, not just a failure's
the code, or the text of the answer
```
Code finds these defined: FOLDER (the canaries' folder, with files `secret` and `lib/canary.py`), MARK (stands in the
name of any file that it makes elsewhere), PORT and UDP_PORT (listening on 127.0.0.1), UNIX (an abstract socket),
VICTIM and PARENT (processes; the second one judges), ADDRESS (of eight bytes in that one). In C they are macros, and
FUNCTION is the function's name; in texts they, QUESTION and EXPRESSION are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ossia.errors import DataError

PROGRAMS = Path(__file__).with_name("programs")
INTERFACES = {
    "any": "`def solve(*args)`, whatever it is called there and gets: Python functions, and Harmony's python tool",
    "text": "an answer that is judged as text",
    "tool": "cells of Harmony's python tool",
    "c": "a function in C, called FUNCTION",
}
_HEADER = re.compile(r"# ([a-z][a-z ]*): (.*)")


@dataclass(frozen=True, slots=True)
class Attack:
    """One of them.

    name  CLASS/NAME, as its file is called
    """

    name: str
    kind: str
    tries: str
    interface: str
    harms: bool
    may_earn_as_honest: bool
    code: str
    path: Path


def read_attacks(folders: Iterable[Path] = (PROGRAMS,)) -> list[Attack]:
    """All attacks below some folders, by name. Raises DataError for a file that isn't one, or a folder without any."""
    found = []
    for folder in folders:
        files = sorted(folder.glob("*/*.txt"))
        if not files:
            raise DataError(f"{folder}: no attacks there\n  expected: {folder}/CLASS/NAME.txt, as in {PROGRAMS}")
        found += [_read(file) for file in files]
    return found


def _read(file: Path) -> Attack:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines or not lines[0].startswith("# ") or _HEADER.fullmatch(lines[0].rstrip("\n")):
        raise DataError(f"{file}:1: expected: `# ` and a sentence that says what it tries")
    header: dict[str, str] = {}
    for line in lines[1:]:
        said = _HEADER.fullmatch(line.rstrip("\n"))
        if said is None or said[1] in header:
            break
        header[said[1]] = said[2]
    for number, (key, value) in enumerate(header.items(), 2):
        allowed = {"for": r"[A-Za-z_]\w*", "harms": "yes", "at most": "honest"}
        if key not in allowed or not re.fullmatch(allowed[key], value):
            expected = "; ".join(("`# for: NAME`", "`# harms: yes`", "`# at most: honest`"))
            raise DataError(f"{file}:{number}: `{key}: {value}` is none of these: {expected}")
    code = "".join(lines[1 + len(header) :])
    if "for" not in header or not code:
        missing = "code" if "for" in header else "`# for:` and what it attacks, such as `any`"
        raise DataError(f"{file}: it has no {missing}")
    return Attack(
        name=f"{file.parent.name}/{file.stem}",
        kind=file.parent.name,
        tries=lines[0][2:].strip(),
        interface=header["for"],
        harms="harms" in header,
        may_earn_as_honest="at most" in header,
        code=code,
        path=file,
    )
