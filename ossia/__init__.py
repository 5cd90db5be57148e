"""Ossia: fine-tune, run and export OpenAI's gpt-oss models. `ossia.load` and `ossia.train` are the way in from Python.

Nothing heavy is imported until it is used: `import ossia` doesn't import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ossia.api import load, train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports `load` and `train` on first use (PEP 562)."""
    if name in ("load", "train"):
        from ossia import api

        return {"load": api.load, "train": api.train}[name]
    raise AttributeError(f"module 'ossia' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
