"""The repository's own files, read and parsed once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def package() -> dict[Path, ast.Module]:
    """The package's modules by path relative to the repository."""
    return _parsed("ossia")


@pytest.fixture(scope="session")
def all_code(package: dict[Path, ast.Module]) -> dict[Path, ast.Module]:
    """Package, tests, benchmarks and examples."""
    return package | _parsed("tests") | _parsed("benchmarks") | _parsed("examples")


def _parsed(folder: str) -> dict[Path, ast.Module]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT): ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in files}
