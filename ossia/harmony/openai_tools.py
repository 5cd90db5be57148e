"""OpenAI function tools to `Tool`s, and whose keys a tool, a call and a JSON Schema may have.

A key that is misspelt would be skipped in silence, and the model would not be shown what the user wrote. So in a tool
and in a call a key that isn't known is an error. JSON Schema has an open vocabulary, in which `widget` beside `type` is
legal: there it is an error where the schema breaks JSON Schema itself (`"type": "str"`), where a key is nearly one that
the model is shown (`proprties`), and where a map of properties stands in the place of a schema. Any other unknown key
is counted and told. Keywords that Harmony doesn't show (`pattern`, `anyOf`, `$ref`) are fine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from ossia.errors import HarmonyError
from ossia.harmony.messages import Tool
from ossia.harmony.vocab import check_field

NAME = re.compile(r"[A-Za-z0-9_.-]+")
MOST_LEVELS = 64  # of a schema inside a schema, and of a value inside a value: what Python takes differs by its version
_FUNCTION = ("name", "description", "parameters", "strict")
_CALLED = ("name", "arguments")
# `transformers` adds `return` to a function, and Harmony writes every result as `any`; OpenAI's client adds the other.
_SAYS_NOTHING = ("return", "parsed_arguments")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# Keyword -> what its value has to be, for those that the model is shown: JSON Schema (2020-12 and older) and OpenAPI.
_SHOWN: Mapping[str, tuple[type[Any] | tuple[type[Any], ...], str]] = MappingProxyType(
    {
        "type": ((str, list), f"one of {', '.join(_TYPES)}, or a list of these"),
        "properties": (Mapping, "an object of schemas"),
        "required": (list, "a list of names"),
        "description": (str, "text"),
        "title": (str, "text"),
        "enum": (list, "a list of values"),
        "examples": (list, "a list of values"),
        "items": ((Mapping, list, bool), "a schema"),
        "oneOf": (list, "a list of schemas"),
        "nullable": (bool, "true or false"),
        "default": (object, "any value"),
    }
)
_SCHEMA = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_SCHEMAS = ("oneOf", "anyOf", "allOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# fmt: off
_NOT_SHOWN = (
    "const", "format", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "minContains", "maxContains",
    "minProperties", "maxProperties", "dependentRequired", "dependencies", "additionalItems", "unevaluatedItems",
    "unevaluatedProperties", "contentEncoding", "contentMediaType", "contentSchema", "deprecated", "readOnly",
    "writeOnly", "id", "example", "discriminator", "xml", "externalDocs", "propertyOrdering",
)
# fmt: on
_KNOWN = frozenset([*_SHOWN, *_SCHEMA, *_SCHEMAS, *_NAMED_SCHEMAS, *_NOT_SHOWN])
_NULL_SAYS_SOMETHING = ("default", "const")  # under any other key null is no schema and no setting


def tools_from_openai(tools: Sequence[Mapping[str, Any]], notes: list[str] | None = None) -> tuple[Tool, ...]:
    """Read a list of OpenAI function tools, `{"type": "function", "function": {...}}` or the bare function.

    notes   takes a line for each thing in a schema that is legal and says nothing to the model
    Raises  HarmonyError naming the field, `tools[1].function.name`
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        fail("tools", f"expected a list of function tools, found {seen(tools)}")
    found: dict[str, Tool] = {}
    for index, row in enumerate(tools):
        function, field = function_of(row, f"tools[{index}]", _FUNCTION, ())
        name = name_of(function.get("name"), f"{field}.name")
        description = function.get("description")
        parameters = function.get("parameters")
        if not isinstance(description, str | None):
            fail(f"{field}.description", f"expected text, found {seen(description)}")
        if not isinstance(parameters, Mapping | None):
            fail(f"{field}.parameters", f"expected a JSON Schema object, found {seen(parameters)}")
        check_field(description or "", f"{field}.description")
        if name in found:
            fail(f"{field}.name", f"the tool {name} is listed twice")
        if parameters is not None:
            parameters = _Schemas([] if notes is None else notes).read(parameters, f"{field}.parameters")
        found[name] = Tool(name, description or "", parameters)
    return tuple(found.values())


def function_called(call: Any, field: str) -> tuple[Mapping[str, Any], str]:
    """The function's own object of a call, `{"id", "type", "function"}` or bare, and its field. Raises HarmonyError."""
    return function_of(call, field, _CALLED, ("id", "index"))


def function_of(
    value: Any, field: str, inner: tuple[str, ...], outer: tuple[str, ...]
) -> tuple[Mapping[str, Any], str]:
    """The function's own object of a tool or a call, and its field: nested under `function`, or bare.

    inner, outer   keys that the function may have, and its wrapper besides `type` and `function`
    Raises         HarmonyError for another key, naming the nearest
    """
    if not isinstance(value, Mapping):
        fail(field, f"expected an object with a function, found {seen(value)}")
    if value.get("type", "function") not in ("function", None):
        fail(f"{field}.type", f"found {seen(value['type'])}; allowed: function")
    function = value.get("function")
    if function is None:
        check_keys(value, field, ("function", "type", *outer, *inner), _SAYS_NOTHING)
        return value, field
    if not isinstance(function, Mapping):
        fail(f"{field}.function", f"expected an object with a name, found {seen(function)}")
    for key in inner:
        if value.get(key) is not None:
            fail(f"{field}.{key}", "stands beside `function`; it belongs inside it")
    check_keys(value, field, ("type", "function", *outer))
    check_keys(function, f"{field}.function", inner, _SAYS_NOTHING)
    return function, f"{field}.function"


def check_keys(row: Mapping[str, Any], field: str, allowed: tuple[str, ...], ignored: tuple[str, ...] = ()) -> None:
    """Refuse a key that would be skipped in silence, naming the nearest; null is the same as absent.

    ignored   may be there, and says nothing to the model
    Raises    HarmonyError
    """
    for key, value in row.items():
        if value is not None and key not in allowed and key not in ignored:
            fail(f"{field}.{key}", f"unknown key; allowed: {', '.join(allowed)}{nearest(key, allowed)}")


def name_of(value: Any, field: str) -> str:
    """A function's name without the namespace. Raises HarmonyError."""
    name = value.removeprefix("functions.") if isinstance(value, str) else ""
    if not NAME.fullmatch(name):
        fail(field, f"expected a name of letters, digits, _ . or -, found {seen(value)}")
    return name


class _Schemas:
    """Reads a JSON Schema: a copy without the keys and properties that are null, which no schema has on purpose."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def read(self, schema: Mapping[str, Any], field: str, level: int = 0) -> dict[str, Any]:
        if level == MOST_LEVELS:
            fail(field, f"a schema inside {MOST_LEVELS} others; make it flatter")
        kept: dict[str, Any] = {}
        known = False
        for key, value in schema.items():
            if value is None and key not in _NULL_SAYS_SOMETHING:
                continue
            if not isinstance(key, str):
                fail(field, f"expected text as keys, found {seen(key)}")
            known = known or key in _KNOWN
            self._check(key, value, schema, field)
            kept[key] = self._inner(key, value, f"{field}.{key}", level)
        if not known and any(isinstance(value, Mapping) for value in kept.values()):
            names = ", ".join(map(str, kept))
            fail(field, f'expected a JSON Schema, {{"type": "object", "properties": {{...}}}}, found the keys {names}')
        if "properties" in kept and kept.get("type") != "object" and "oneOf" not in kept:
            self._notes.append("tool schemas with properties but without `type: object`, shown to the model as `any`")
        return kept

    def _inner(self, key: str, value: Any, field: str, level: int) -> Any:
        """The value with the schemas in it read."""
        if isinstance(value, Mapping):
            if key in _NAMED_SCHEMAS:
                named = {name: inner for name, inner in value.items() if inner is not None}
                return {name: self._one(inner, f"{field}.{name}", level) for name, inner in named.items()}
            if key in _SCHEMA:
                return self.read(value, field, level + 1)
        elif isinstance(value, list) and key in _SCHEMAS:
            return [self._one(inner, f"{field}[{index}]", level) for index, inner in enumerate(value)]
        check_texts(value, field)
        return value

    def _one(self, value: Any, field: str, level: int) -> Any:
        check_texts(field, field)
        if isinstance(value, Mapping):
            return self.read(value, field, level + 1)
        if not isinstance(value, bool):
            fail(field, f"expected a schema, found {seen(value)}")
        return value

    def _check(self, key: str, value: Any, schema: Mapping[str, Any], field: str) -> None:
        """Refuse what JSON Schema forbids and what is nearly a keyword that is shown; note what it doesn't know."""
        shown = _SHOWN.get(key)
        if shown is None:
            if key not in _KNOWN and not key.startswith(("$", "x-", "x_")):
                self._unknown(key, value, field)
            return
        kinds, expected = shown
        if not isinstance(value, kinds):
            fail(f"{field}.{key}", f"expected {expected}, found {seen(value)}")
        if key == "type":
            for name in [value] if isinstance(value, str) else value:
                if name not in _TYPES:
                    fail(f"{field}.type", f"found {seen(name)}; allowed: {', '.join(_TYPES)}{_nearest_type(name)}")
        elif key == "required":
            self._required(value, schema.get("properties"), f"{field}.required")

    def _required(self, names: list[Any], properties: Any, field: str) -> None:
        for index, name in enumerate(names):
            if not isinstance(name, str):
                fail(f"{field}[{index}]", f"expected the name of a property, found {seen(name)}")
            if isinstance(properties, Mapping) and properties.get(name) is None:
                if near := nearest(name, map(str, properties), 0.75):
                    fail(f"{field}[{index}]", f"{seen(name)} is none of the properties{near}")
                check_field(name, f"{field}[{index}]")
                self._notes.append(f"tool schemas that require `{name}`, which is none of their properties")

    def _unknown(self, key: str, value: Any, field: str) -> None:
        plain = key.replace("_", "").lower()
        exact = next((name for name in _SHOWN if name.lower() == plain), None)
        near = f"; did you mean {exact}?" if exact else nearest(key, _SHOWN, 0.75)
        if near:
            fail(f"{field}.{key}", f"no keyword of JSON Schema{near} (if you didn't: call it x-{key})")
        if isinstance(value, Mapping) and "type" in value:
            fail(f"{field}.{key}", "no keyword of JSON Schema; if it is a property, it belongs under `properties`")
        check_field(key, field)
        self._notes.append(f"tool schemas with the key `{key}`, which JSON Schema doesn't know; it isn't shown")


def _nearest_type(name: Any) -> str:
    """The type that a word of another language stands for, or the nearest word."""
    words = {"str": "string", "text": "string", "int": "integer", "float": "number", "double": "number"}
    words |= {"bool": "boolean", "dict": "object", "map": "object", "list": "array", "tuple": "array", "none": "null"}
    word = name.lower() if isinstance(name, str) else ""
    return f"; did you mean {words[word]}?" if word in words else nearest(word, _TYPES)


def check_texts(value: Any, field: str, level: int = 0) -> None:
    """Raise HarmonyError, naming the field, for a text anywhere inside `value` that isn't Unicode, for what JSON has no
    type for, and for a value inside MOST_LEVELS others."""
    if isinstance(value, str):
        check_field(value, field)
    elif level == MOST_LEVELS:
        fail(field, f"a value inside {MOST_LEVELS} others; make it flatter")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_texts(key, field)
            check_texts(item, f"{field}.{key}", level + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_texts(item, f"{field}[{index}]", level + 1)
    elif not isinstance(value, int | float | None):
        fail(field, f"can't be written as JSON: found {seen(value)}")


# --- what messages have in common -------------------------------------------------------------------------------------


def nearest(value: Any, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean X?`, or nothing."""
    near = difflib.get_close_matches(value, list(allowed), 1, cutoff) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def seen(value: Any) -> str:
    """A value for a message: its beginning, and its type where that isn't plain from it."""
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return shown if value is None or isinstance(value, str | int | float | bool) else f"{type(value).__name__} {shown}"


def fail(field: str, message: str) -> NoReturn:
    """Raise HarmonyError for a field."""
    raise HarmonyError(message, field)
