"""What sympy imports at first use, to be imported before a process locks itself in: later it could open no file.

An import that fails inside of sympy is often taken for "not equal", so a right answer would earn nothing.
"""

from __future__ import annotations

_FOLDERS = (
    "algebras calculus combinatorics concrete core discrete functions geometry integrals liealgebras logic matrices "
    "multipledispatch ntheory physics.units polys printing.str printing.pretty printing.latex sets series simplify "
    "solvers stats strategies tensor unify utilities vector"
)
_NEITHER = (
    "tests benchmarks mathml codegen compatibility trace pytest randtest runtests tmpfiles"  # unused or deprecated
)
SYMPY = f"""
import importlib, pkgutil, sympy
for folder in {_FOLDERS!r}.split():
    module = importlib.import_module("sympy." + folder)
    inside = pkgutil.walk_packages(module.__path__, module.__name__ + ".") if "__path__" in vars(module) else ()
    for _, name, _ in inside:
        if not set(name.split(".")) & set({_NEITHER!r}.split()):
            importlib.import_module(name)
"""
