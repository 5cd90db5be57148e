"""What every section of a recipe is made with: strict frozen models, defaults in words, clashes between keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# `strict=False`: YAML gives lists and text where Python code is better served by tuples and paths.
FolderPath = Annotated[Path, Field(strict=False), BeforeValidator(lambda value: _not_empty(value))]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def words(default: str) -> dict[str, Any]:
    """Words for a default that depends on other keys, shown by `ossia explain`."""
    return {"default_in_words": default}


class Clash(NamedTuple):
    """A combination of values that can't be: the keys in it (dotted, inside their section; the one to blame first)."""

    keys: tuple[str, ...]
    message: str


def refuse(*clashes: Clash | None) -> None:
    """Raises all clashes that are not None, in one error that the recipe's loader takes apart again."""
    found = [clash for clash in clashes if clash is not None]
    if found:
        text = "; ".join(clash.message for clash in found)
        raise PydanticCustomError("combination", "{text}", {"text": text, "clashes": found})


def _not_empty(value: Any) -> Any:
    """An empty text would be the current folder."""
    if value == "":
        raise PydanticCustomError("empty", "is empty")
    return value


def listed(value: Any, name: str) -> Any:
    """What is written short: an entry alone is a list of one, and a text is an entry that gives `name` alone."""
    entries = [value] if isinstance(value, (str, dict, BaseModel)) else value
    return [{name: one} if isinstance(one, str) else one for one in entries] if isinstance(entries, list) else entries


class Section(BaseModel):
    """A section: frozen, no unknown keys, strict types."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,  # a key that is a word of Python's has another name in Python
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_have_defaults(cls, given: Any) -> Any:
        """`train:` with all its keys commented out reads as null in YAML; it means a section with none of them."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or not cls._is_section(key)}

    @classmethod
    def _is_section(cls, key: str) -> bool:
        kind = cls.model_fields[key].annotation if key in cls.model_fields else None
        return isinstance(kind, type) and issubclass(kind, Section)
