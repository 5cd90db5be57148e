"""The server: an OpenAI-compatible HTTP interface over one engine. Its packages are the extra `serve`."""

from __future__ import annotations

from importlib.util import find_spec

from ossia.errors import MissingExtraError

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Raise MissingExtraError if a package of the server's is missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"the server needs {', '.join(missing)}: pip install 'ossia[serve]'")
