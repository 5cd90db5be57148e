"""What environments' options have in common: a number within bounds."""

from __future__ import annotations

from ossia.errors import RecipeError


def check_range(env: str, option: str, value: float, least: float, most: float) -> None:
    """Raise RecipeError unless least <= value <= most."""
    if not least <= value <= most:
        found = value if isinstance(value, int) else f"{value:g}"
        raise RecipeError(f"env.{env}: `{option}` is {found}; allowed: {least} to {most}")
