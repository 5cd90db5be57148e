"""Files, functions and folders stay small enough to read."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

FILE_LINES = 600  # aim at 300
FUNCTION_LINES = 100  # aim at 40
FOLDER_FILES = 10  # of the package, dunder files not counted; aim at 7


def test_no_file_is_over_the_wall(all_code: dict[Path, ast.Module], root: Path) -> None:
    lengths = {file: len((root / file).read_text(encoding="utf-8").splitlines()) for file in all_code}
    assert {str(file): lines for file, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_over_the_wall(all_code: dict[Path, ast.Module]) -> None:
    over = {
        f"{file}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file, tree in all_code.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    }
    assert over == {}


def test_no_folder_of_the_package_holds_too_many_files(package: dict[Path, ast.Module]) -> None:
    files = Counter(str(file.parent) for file in package if not file.name.startswith("__"))
    assert {folder: number for folder, number in files.items() if number > FOLDER_FILES and folder != "ossia"} == {}
    top = FOLDER_FILES + 2  # the package itself holds one story a file
    assert files["ossia"] <= top
