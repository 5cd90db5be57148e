"""What the package offers is named, typed and described; nothing guesses, and nothing swallows an error."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import ossia

Function = ast.FunctionDef | ast.AsyncFunctionDef
SHORT_METHOD_LINES = 7
NEEDS_ITS_OWN_PACKAGE = ("ossia.kernels", "ossia.__main__")  # Triton; and running it is its import


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function, bool]]:
    """Name, node and whether it is a method, of the functions that others may call."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and (not inner.name.startswith("_") or inner.name == "__init__"):
                    yield f"{node.name}.{inner.name}", inner, not _is_static(inner)


def _is_static(node: Function) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)


def _untyped(node: Function, method: bool) -> list[str]:
    positional = [*node.args.posonlyargs, *node.args.args][1 if method else 0 :]
    others = [arg for arg in (*node.args.kwonlyargs, node.args.vararg, node.args.kwarg) if arg is not None]
    names = [arg.arg for arg in (*positional, *others) if arg.annotation is None]
    return names if node.returns is not None else [*names, "return"]


def test_every_module_imports_and_every_name_it_offers_is_there() -> None:
    for found in pkgutil.walk_packages(ossia.__path__, "ossia."):
        if found.name.startswith(NEEDS_ITS_OWN_PACKAGE):
            continue
        module = importlib.import_module(found.name)
        offered = vars(module).get("__all__", ())
        assert [name for name in offered if name not in vars(module)] == [], found.name


def test_the_packages_own_names_resolve() -> None:
    for name in ossia.__all__:
        if (Path(ossia.__file__).parent / "api.py").is_file() or name == "__version__":
            assert getattr(ossia, name) is not None
    assert sorted(ossia.__all__) == dir(ossia)


def test_every_module_and_public_class_says_what_it_is(package: dict[Path, ast.Module]) -> None:
    silent = [str(file) for file, tree in package.items() if tree.body and not ast.get_docstring(tree)]
    silent += [
        f"{file}:{node.lineno} {node.name}"
        for file, tree in package.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_every_public_function_says_what_it_does(package: dict[Path, ast.Module]) -> None:
    silent = [
        f"{file}:{node.lineno} {name}"
        for file, tree in package.items()
        for name, node, method in public_functions(tree)
        if not ast.get_docstring(node) and not (method and _says_it_by_its_name(node))
    ]
    assert silent == []


def _says_it_by_its_name(node: Function) -> bool:
    """A property, or a method of a few lines; a constructor is described by its class."""
    marks = {mark.id for mark in node.decorator_list if isinstance(mark, ast.Name)}
    lines = (node.end_lineno or 0) - node.lineno + 1
    return node.name == "__init__" or lines <= SHORT_METHOD_LINES or bool(marks & {"property", "cached_property"})


def test_every_public_function_is_fully_typed(package: dict[Path, ast.Module]) -> None:
    untyped = [
        f"{file}:{node.lineno} {name}: {', '.join(missing)}"
        for file, tree in package.items()
        for name, node, method in public_functions(tree)
        if (missing := _untyped(node, method))
    ]
    assert untyped == []


def test_no_error_is_caught_without_saying_which(package: dict[Path, ast.Module]) -> None:
    assert [where for file, tree in package.items() for where in _broad_catches(file, tree)] == []


def _broad_catches(file: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or (isinstance(kind, ast.Name) and kind.id in _BROAD) for kind in kinds):
                yield f"{file}:{node.lineno}"


_BROAD = ("Exception", "BaseException")


def test_a_broad_catch_is_seen_in_every_form() -> None:
    for text in ("except Exception:", "except:", "except (ValueError, Exception):", "except BaseException as e:"):
        assert list(_broad_catches(Path("x.py"), ast.parse(f"try:\n    f()\n{text}\n    pass")))


def test_nothing_probes_for_attributes_or_reads_the_environment(package: dict[Path, ast.Module]) -> None:
    """No hasattr, no getattr, no os.environ: what decides a result is an argument.

    One line of the command line writes how OpenMP's threads wait, and one reads where the user's cache is: no result
    depends on either. One reads what a launcher of several processes tells each of them.
    """
    found = []
    for file, tree in package.items():
        for node in ast.walk(tree):
            probe = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _PROBES
            environment = isinstance(node, ast.Attribute) and node.attr in _ENVIRONMENT
            if probe or environment:
                found.append(f"{file}:{node.lineno}")
    assert sorted(place.partition(":")[0] for place in found) == sorted(_USES_ENVIRONMENT)
    for file, line in _USES_ENVIRONMENT.items():
        assert line in (Path(ossia.__file__).parents[1] / file).read_text()


_PROBES = ("hasattr", "getattr", "setattr", "delattr")
_ENVIRONMENT = ("environ", "getenv", "putenv")
_USES_ENVIRONMENT = {
    "ossia/cli/app.py": 'os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")',
    "ossia/train/ranks/launched.py": "_GIVEN: Mapping[str, str] = os.environ",
    "ossia/kernels/cpu/build.py": 'os.environ.get("XDG_CACHE_HOME", "")',
}
