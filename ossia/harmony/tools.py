"""Tools as the model reads them: JSON Schema -> the TypeScript of Harmony's `# Tools` sections.

Follows what openai-harmony 0.0.8 writes to the byte, its oddities too (no quotes around the default of an enum, `anyOf`
and `$ref` become `any`, the default of a number as Rust prints it), because that is the text the released models are
served with. Oracle: the library itself, on generated schemas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ossia.errors import HarmonyError
from ossia.harmony.messages import Tool

Builtin = Literal["browser", "python"]
SIMPLE_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def function_tools(tools: Sequence[Tool]) -> str:
    """The `# Tools` section of a developer message: the namespace `functions` with one type per tool."""
    return _sections([_namespace("functions", "", tools)])


def builtin_tools(names: Iterable[Builtin]) -> str:
    """The `# Tools` section of a system message for the builtin tools, in alphabetical order.

    Raises  HarmonyError for a name that isn't a builtin tool
    """
    sections = []
    for name in sorted(set(names)):
        if name not in BUILTIN:
            raise HarmonyError(f"unknown builtin tool {name!r}; allowed: {', '.join(BUILTIN)}", "builtin_tools")
        sections.append(_namespace(name, *BUILTIN[name]))
    return _sections(sections)


def typescript(schema: Any, indent: str = "") -> str:
    """One JSON Schema as a TypeScript type; what it can't say becomes `any`, as in the library.

    Raises  HarmonyError if a default is a number that JSON doesn't have (NaN, infinity)
    """
    if not isinstance(schema, Mapping):
        return "any"
    variants, kind = schema.get("oneOf"), schema.get("type")
    if isinstance(variants, list):
        return "".join(_variant(variant, indent) for variant in variants)
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and (values := [f'"{value}"' for value in _enum(schema) if isinstance(value, str)]):
        return " | ".join(values)
    return SIMPLE_TYPES.get(kind, "any") if isinstance(kind, str) else "any"


def _sections(namespaces: list[str]) -> str:
    return "\n\n".join(["# Tools", *namespaces])


def _namespace(name: str, description: str, tools: Sequence[Tool]) -> str:
    lines = [f"## {name}\n"]
    lines += [f"// {line}" if tools else line for line in _lines(description)]
    if tools:
        lines.append(f"namespace {name} {{\n")
        for tool in tools:
            lines += [f"// {line}" for line in _lines(tool.description)]
            takes = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
            lines.append(f"type {tool.name} = ({takes}) => any;\n")
        lines.append(f"}} // namespace {name}")
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    """Lines ended by "\\n" or "\\r\\n" only (`str.splitlines` splits at a dozen other characters too)."""
    lines = text.split("\n")
    ended, last = [line.removesuffix("\r") for line in lines[:-1]], lines[-1]
    return [*ended, last] if last else ended


def _object(schema: Mapping[str, Any], indent: str) -> str:
    out = []
    if isinstance(description := schema.get("description"), str):
        out.append(f"{indent}// {description}\n")
    out.append("{\n")
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping):
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        out += [_property(key, value, key in needed, indent) for key, value in properties.items()]
    out.append(f"{indent}}}")
    return "".join(out)


def _property(key: str, schema: Any, needed: bool, indent: str) -> str:
    """One `name?: type,` of an object, with the comments above and after it."""
    name = key if needed else f"{key}?"
    if not isinstance(schema, Mapping):
        return f"{indent}{name}: any,\n"
    out = []
    if isinstance(title := schema.get("title"), str):
        out.append(f"{indent}// {title}\n{indent}//\n")
    description = schema.get("description")
    if "oneOf" not in schema and isinstance(description, str):
        out.append(f"{indent}// {description}\n")
    if isinstance(examples := schema.get("examples"), list) and examples:
        out.append(f"{indent}// Examples:\n")
        out += [f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str)]
    if isinstance(schema.get("oneOf"), list):
        return "".join(out) + _one_of_property(name, schema, indent)
    out.append(f"{indent}{name}: {_nullable(typescript(schema, indent + '    '), schema)},")
    if "oneOf" not in schema and "default" in schema:
        out.append(f" // {_default(schema)}")
    return "".join(out) + "\n"


def _one_of_property(name: str, schema: Mapping[str, Any], indent: str) -> str:
    """A property with alternatives, one a line; a description that it shares with the first is written only once."""
    out = []
    variants: list[Any] = schema["oneOf"]
    about = schema.get("description")
    about = about if isinstance(about, str) else None
    above = about is not None and not (variants and _text(variants[0], "description") == about)
    if above:
        out.append(f"{indent}// {about}\n")
    if "default" in schema:
        out.append(f"{indent}// {_default(schema)}\n")
    out.append(f"{indent}{name}:\n")
    for index, variant in enumerate(variants):
        out.append(f"{indent} | {_nullable(typescript(variant, indent + '   '), variant)}")
        comments = []
        own = _text(variant, "description")
        if own is not None and own != about and not (index == 0 and above):
            comments.append(own)
        if isinstance(variant, Mapping) and "default" in variant:
            comments.append(_default(variant))
        out.append(f" // {' '.join(comments)}\n" if comments else "\n")
    return "".join(out) + f"{indent},\n"


def _variant(schema: Any, indent: str) -> str:
    """One alternative of a `oneOf` that is not a property's own: on a new line, comments after it."""
    comments = []
    if (about := _text(schema, "description")) is not None:
        comments.append(about)
    if isinstance(schema, Mapping) and "default" in schema:
        value = schema["default"]
        plain = isinstance(value, str) and not _enum(schema)
        comments.append(f'default: "{value}"' if plain else f"default: {_json(value)}")
    after = f" // {' '.join(comments)}" if comments else ""
    return f"\n{indent} | {_nullable(typescript(schema, indent + '   '), schema)}{after}"


def _nullable(kind: str, schema: Any) -> str:
    wanted = isinstance(schema, Mapping) and schema.get("nullable") is True and "null" not in kind
    return f"{kind} | null" if wanted else kind


def _default(schema: Mapping[str, Any]) -> str:
    value = schema["default"]
    if not isinstance(value, str):
        return f"default: {_json(value)}"
    return f"default: {value}" if _enum(schema) else f'default: "{value}"'


def _enum(schema: Mapping[str, Any]) -> list[Any]:
    values = schema.get("enum")
    return values if isinstance(values, list) else []


def _text(schema: Any, key: str) -> str | None:
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, str) else None


def _json(value: Any) -> str:
    """Compact JSON with numbers as Rust reads and prints them; integers beyond 64 bits count as floats."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_json(str(key))}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_json, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text
    return text if isinstance(value, int) and -(2**63) <= value < 2**64 else _float(_rust_reads(text))


def _rust_reads(text: str) -> float:
    """A JSON number as the library's parser (serde_json) takes it: digits times a power of ten, each step rounded.

    So the last digit of 0.38029650279877636 can differ from the nearest float's. HarmonyError for NaN and infinity.
    """
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits, power = whole + fraction, int(exponent or 0) - len(fraction)
    if not digits.lstrip("-").isdigit():
        raise HarmonyError(f"the default {text} is not a JSON number", "tools")
    while abs(int(digits)) >= 2**64:
        digits, power = digits[:-1], power + 1
    value = float(digits)
    while power < -308:
        value, power = value / 1e308, power + 308
    value = value / float(f"1e{-power}") if power < 0 else value * float(f"1e{power}")
    if not math.isfinite(value):
        raise HarmonyError(f"the default {text} is too large for a JSON number", "tools")
    return value


def _float(value: float) -> str:
    """The shortest digits that read back the same; with an exponent from 1e16 up and below 1e-5."""
    digits, _, exponent = repr(value).partition("e")
    if not exponent:
        return digits
    if exponent == "-05":
        sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{digits}e{int(exponent)}"


def _schema(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


_NUMBER = {"type": "number", "default": -1}
BUILTIN: dict[str, tuple[str, tuple[Tool, ...]]] = {
    "browser": (
        "Tool for browsing.\n"
        "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
        "Cite information from the tool using the following format:\n"
        "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
        "Do not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)",
        (
            Tool(
                "search",
                "Searches for information related to `query` and displays `topn` results.",
                _schema(
                    ["query"],
                    query={"type": "string"},
                    topn={"type": "number", "default": 10},
                    source={"type": "string"},
                ),
            ),
            Tool(
                "open",
                "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, "
                "showing `num_lines` lines.\n"
                "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
                "If `cursor` is not provided, the most recent page is implied.\n"
                "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
                "If `loc` is not provided, the viewport will be positioned at the beginning of the document or "
                "centered on the most relevant passage, if available.\n"
                "Use this function without `id` to scroll to a new location of an opened page.",
                _schema(
                    [],
                    id={"type": ["number", "string"], "default": -1},
                    cursor=_NUMBER,
                    loc=_NUMBER,
                    num_lines=_NUMBER,
                    view_source={"type": "boolean", "default": False},
                    source={"type": "string"},
                ),
            ),
            Tool(
                "find",
                "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
                _schema(["pattern"], pattern={"type": "string"}, cursor=_NUMBER),
            ),
        ),
    ),
    "python": (
        "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This "
        "tool should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. "
        "when creating plots, tables, or files).\n\n"
        "When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook "
        "environment. python will respond with the output of the execution or time out after 120.0 seconds. The drive "
        "at '/mnt/data' can be used to save and persist user files. Internet access for this session is UNKNOWN. "
        "Depends on the cluster.",
        (),
    ),
}
