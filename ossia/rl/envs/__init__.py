"""Environments by name, and those of a user's own by reference."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ossia.config.keys import nearest
from ossia.errors import RecipeError
from ossia.rl.env import Caught, Env
from ossia.rl.envs import gym
from ossia.rl.envs.game2048 import Game2048
from ossia.rl.envs.kernel_c import KernelC
from ossia.rl.envs.math import Math
from ossia.rl.envs.matmul import Matmul
from ossia.rl.envs.procedural import Add, Count, Reverse, Sort
from ossia.rl.envs.squares import Squares
from ossia.rl.envs.tool_python import ToolPython
from ossia.rl.jail import Jails

ENVS: Mapping[str, Callable[..., Env]] = {
    "sort": Sort,
    "reverse": Reverse,
    "add": Add,
    "count": Count,
    "squares": Squares,
    "game2048": Game2048,
    "matmul": Matmul,
    "math": Math,
    "reasoning_gym": gym.make,
    "tool_python": ToolPython,
    "kernel_c": KernelC,
}
ADAPTERS = ("gymnasium", "openenv", "verifiers")  # `KIND:NAME` is loaded by ossia/rl/adapters/KIND.py


def make_env(name: str, options: Mapping[str, Any], jails: Jails) -> Env:
    """An environment from a recipe's `env` entry.

    name     one of ENVS, `module:name` or `file.py:name` of a class or function that makes an environment, or
             `PACKAGE:NAME` of another ecosystem's (ADAPTERS)
    options  its own, as keyword arguments
    jails    given, as the argument `jails`, to an environment that has one: it runs code that it doesn't trust
    Raises   RecipeError for a name or an option that doesn't exist, or a value that isn't allowed; JailError
    """
    kind, _, theirs = name.partition(":")
    if kind in ADAPTERS and theirs:
        return _adapted(name, importlib.import_module(f"ossia.rl.adapters.{kind}").load, theirs, options)
    if ":" in name:
        return _made(name, load_object(name), options, jails)
    if name not in ENVS:
        guess, names = _guess(name, ENVS), ", ".join(ENVS)
        raise RecipeError(f"env: no environment `{name}`{guess}\n  allowed: {names}, or `file.py:name` of your own")
    maker = ENVS[name]
    if not (isinstance(maker, type) and is_dataclass(maker)):
        return maker(jails=jails, **options)  # it has an option of its own for whatever is asked, and checks them
    asked = {field.name: field for field in fields(maker) if field.init}
    held = {"jails": jails} if asked.pop("jails", None) else {}
    allowed = {option: field.type for option, field in asked.items()}
    given: dict[str, Any] = {}
    for option, value in options.items():
        if option not in allowed:
            guess = _guess(option, allowed)
            raise RecipeError(f"env.{name}: unknown option `{option}`{guess}\n  allowed: {', '.join(allowed)}")
        given[option] = float(value) if allowed[option] == "float" and type(value) is int else value
        if type(given[option]).__name__ != allowed[option]:
            raise RecipeError(f"env.{name}: `{option}` is {value!r}; expected: {allowed[option]}")
    missing = [option for option, field in asked.items() if field.default is MISSING and option not in options]
    if missing:
        raise RecipeError(f"env.{name}: `options.{missing[0]}` is missing\n  allowed: {', '.join(allowed)}")
    return maker(**given, **held)


def _guess(word: str, candidates: Iterable[str]) -> str:
    meant = nearest(word, candidates)
    return f"; did you mean `{meant}`?" if meant else ""


def _adapted(name: str, load: Callable[..., Env], theirs: str, options: Mapping[str, Any]) -> Env:
    wanted = inspect.signature(load)
    try:
        wanted.bind(theirs, **options)
    except TypeError as error:
        allowed = [option for option, one in wanted.parameters.items() if one.kind is one.KEYWORD_ONLY]
        raise RecipeError(f"env {name}: {error}\n  allowed: {', '.join(allowed) or 'none'}") from error
    return load(theirs, **options)


def _made(name: str, maker: Callable[..., Env], options: Mapping[str, Any], jails: Jails) -> Env:
    held = {"jails": jails} if "jails" in inspect.signature(maker).parameters else {}
    made: Any = None
    with (caught := Caught(theirs_alone=True)):
        try:
            made = maker(**options, **held)
        except TypeError as error:
            raise RecipeError(f"env: `{name}` can't be made with {dict(options)}: {error}") from error
    if caught.why is not None:
        raise RecipeError(f"env: `{name}` can't be made: {caught.why}")
    if not isinstance(made, Env):
        raise RecipeError(
            f"env: `{name}` is {type(made).__name__}; expected: an environment, with tasks, open and examples\n"
            "  next: see docs/rl.md, Own rewards; a reward function goes into `reward:`"
        )
    return made


def load_object(reference: str) -> Any:
    """What `module:name` or `file.py:name` stands for. Raises RecipeError where there is no such thing."""
    where, _, name = reference.rpartition(":")
    module = _load_module(where, reference)
    if name not in vars(module):
        raise RecipeError(f"`{reference}`: {where} has no `{name}`; it has: {_public(module)}")
    return vars(module)[name]


def _load_module(where: str, reference: str) -> ModuleType:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise RecipeError(f"`{reference}`: {where} is no file (the current folder is {Path.cwd()})")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with (caught := Caught()):
            spec.loader.exec_module(module)
        if caught.why is not None:
            raise RecipeError(f"`{reference}`: {where} can't be loaded: {caught.why}")
        return module
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise RecipeError(f"`{reference}`: {where} can't be imported: {error}") from error


def _public(module: ModuleType) -> str:
    return ", ".join(name for name in vars(module) if not name.startswith("_")) or "nothing"
