"""Ossia: fine-tune, run and export OpenAI's gpt-oss models. `ossia.load` and `ossia.train` are the way in from Python.

Nothing heavy is imported until it is used: `import ossia` doesn't import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ossia.api import load, train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports `load` and `train` on first use (PEP 562)."""
    if name == "load":
        from ossia.api import load

        return load
    if name == "train":
        return import_module("ossia.train")
    raise AttributeError(f"module 'ossia' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Train(ModuleType):
    """The folder `ossia/train` and the function share a name, so the module itself can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ossia.api import train

        return train(*args, **kwargs)


class _Package(ModuleType):
    """Whoever imports `ossia.train` first, as a module or to call it, finds the same object."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and type(value) is ModuleType:
            value.__class__ = _Train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
