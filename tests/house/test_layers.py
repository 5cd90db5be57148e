"""Imports point down the layers; neighbours are strangers; what has to be light imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the bottom up; a line may import what stands in the lines above it, and nothing beside it. `demo` and `api` are
# made of stories, so they stand on them.
LAYERS = (
    {"errors", "disk", "sizes"},
    {"config", "harmony", "kernels", "pieces", "remote"},
    {"ops"},
    {"model", "data"},
    {"engine", "train"},
    {"rl", "export", "plan", "axolotl"},
    {"run"},
    {"sft", "grpo", "evaluate", "batch", "chat", "preview"},
    {"api"},
    {"demo", "web"},
    {"cli"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NO_TORCH = (
    "ossia",
    "ossia.errors",
    "ossia.config",
    "ossia.harmony",
    "ossia.cli",
    "ossia.model.budget",
    "ossia.plan",
    "ossia.axolotl",
)


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a module, wherever it stands; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def misplaced(package: dict[Path, ast.Module]) -> list[str]:
    """Every import that doesn't point down, `file:line: what`."""
    found = []
    for file, tree in package.items():
        owner = file.with_suffix("").parts[1]
        if owner in ("__init__", "__main__"):
            continue
        if owner not in RANK:
            found.append(f"{file}: `{owner}` is in no layer; say in tests/house/test_layers.py where it belongs")
            continue
        for line, name in imported(tree, ".".join(file.parent.parts)):
            parts = name.split(".")
            target = parts[1] if parts[0] == "ossia" and len(parts) > 1 else ""
            if target in RANK and target != owner and RANK[target] >= RANK[owner]:
                found.append(f"{file}:{line}: {owner} (layer {RANK[owner]}) imports {name} (layer {RANK[target]})")
    return found


def test_imports_point_down_and_neighbours_are_strangers(package: dict[Path, ast.Module]) -> None:
    assert misplaced(package) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ossia/ops/x.py", "from ossia.model import arch"),
        ("ossia/model/x.py", "import ossia.data.rows"),
        ("ossia/config/x.py", "def f():\n    from ossia.harmony import vocab"),
        ("ossia/data/x.py", "from ..train import loop"),
        ("ossia/sft.py", "from ossia import evaluate"),
        ("ossia/loose.py", "import os"),
    ],
)
def test_the_layer_rule_sees_every_form_of_import(file: str, text: str) -> None:
    assert misplaced({Path(file): ast.parse(text)})


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_has_to_be_light_imports_no_torch(module: str, root: Path) -> None:
    code = f"import sys, pkgutil, importlib; m = importlib.import_module('{module}')\n"
    if module in ("ossia.config", "ossia.harmony", "ossia.model.budget"):
        code += f"for i in pkgutil.iter_modules(m.__path__): importlib.import_module('{module}.' + i.name)\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_import_of_ours_resolves(package: dict[Path, ast.Module], root: Path) -> None:
    """Also those inside functions, which only fail when the function is called."""
    if not (root / "ossia" / "sft.py").is_file():
        pytest.skip("the stories that the commands call are not written yet")
    defined = {file: _names(tree) for file, tree in package.items()}
    missing = []
    for file, tree in package.items():
        for line, name in imported(tree, ".".join(file.parent.parts)):
            if name.startswith("ossia.") and not _resolves(name, defined, root):
                missing.append(f"{file}:{line}: {name}")
    assert missing == []


def _names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.TypeAlias) if sys.version_info >= (3, 12) else False:
            names.add(node.name.id)
    return names


def _resolves(name: str, defined: dict[Path, set[str]], root: Path) -> bool:
    place = Path(*name.split("."))
    if (root / place).is_dir() or place.with_suffix(".py") in defined:
        return True
    for module in (place.parent.with_suffix(".py"), place.parent / "__init__.py"):
        if place.name in defined.get(module, set()) or (place.name == "*" and module in defined):
            return True
    return name == "ossia.__version__"
