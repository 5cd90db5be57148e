"""`response_format` and `tool_choice`: what the model is told of them, and the grammar that holds it to them.

A grammar is used where something has to hold: JSON was asked for, a call is required or ruled out, or a tool is
`strict`. Thinking stays free. Otherwise nothing is masked, and a call's arguments are what the model wrote.
| tool             | its arguments match                                                        |
|------------------|----------------------------------------------------------------------------|
| strict: true     | its parameters                                                             |
| strict: false    | any JSON object, where a grammar is used at all                            |
| nothing said     | its parameters where a call is required, else like false                   |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ossia.engine.grammar import ANY_OBJECT, Constraint, GrammarCompiler
from ossia.errors import UserError
from ossia.harmony import Tool, tools_from_openai
from ossia.web.protocol.errors import ApiError

_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True, slots=True)
class Format:
    """What an answer has to be: text (no schema), or JSON.

    param     the field that asked for it
    told      what the developer message says of it, as OpenAI's Harmony guide has it; None: nothing
    """

    param: str
    schema: Mapping[str, Any] | None = None
    told: str | None = None


def read_format(wanted: Mapping[str, Any] | None, param: str, *, inner: str | None) -> Format:
    """A format from its field; `inner` names the object in which a chat has the schema. Raises ApiError."""
    kind = "text" if wanted is None else wanted.get("type")
    if kind not in _FORMATS:
        raise ApiError(f"{param}.type: found {kind!r}; allowed: {', '.join(_FORMATS)}", param=f"{param}.type")
    if wanted is None or kind == "text":
        return Format(param)
    if kind == "json_object":
        return Format(param, ANY_OBJECT)
    place = param if inner is None else f"{param}.{inner}"
    about = wanted if inner is None else wanted.get(inner)
    if not isinstance(about, Mapping) or not isinstance(about.get("schema"), Mapping):
        raise ApiError(f"{place}.schema: expected a JSON Schema object", param=f"{place}.schema")
    name, description = about.get("name") or "answer", about.get("description")
    if not isinstance(name, str) or not isinstance(description, str | None):
        raise ApiError(f"{place}: name and description have to be texts", param=place)
    comment = f"// {description}\n" if description else ""
    schema = json.dumps(about["schema"], ensure_ascii=False, separators=(",", ":"))
    return Format(f"{place}.schema", about["schema"], f"# Response Formats\n\n## {name}\n\n{comment}{schema}")


def read_tool_choice(choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]) -> str:
    """`tool_choice`, from either of the forms that OpenAI's routes use: none, auto, required, or "=" and a name.

    Raises  ApiError for a tool that isn't there, or anything else
    """
    if choice is None:
        return "auto" if tools else "none"
    name = None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        inner = choice.get("function", choice)
        name = inner.get("name") if isinstance(inner, Mapping) else None
    names = [_function(tool).get("name") for tool in tools]
    if isinstance(name, str) and name not in names:
        message = f"tool_choice: {name} is not among the tools; known: {', '.join(map(str, names)) or 'none'}"
        raise ApiError(message, param="tool_choice")
    if not isinstance(name, str) and choice not in ("none", "auto", "required"):
        allowed = 'none, auto, required, or an object that names a function of "tools"'
        raise ApiError(f"tool_choice: found {choice!r}; allowed: {allowed}", param="tool_choice")
    if choice == "required" and not tools:
        raise ApiError("tool_choice: required, but there are no tools", param="tool_choice")
    return f"={name}" if isinstance(name, str) else str(choice)


def constraint_of(
    grammar: GrammarCompiler | None,
    wanted: Format,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str,
    *,
    parallel: bool,
) -> Constraint | None:
    """The grammar of one answer, or None where nothing has to hold.

    grammar  None: the server has no library for it
    Raises   ApiError naming the field of what can't be enforced; HarmonyError for a tool that can't be read
    """
    strict = [_function(tool).get("strict") for tool in tools]
    called = tool_choice == "required" or tool_choice.startswith("=")
    if wanted.schema is None and not called and not (tools and (tool_choice == "none" or any(strict))):
        return None
    if grammar is None:
        if tool_choice == "none" and wanted.schema is None:
            return None  # the prompt doesn't have the tools either
        param = wanted.param if wanted.schema is not None else "tool_choice" if called else "tools"
        raise ApiError(f"{param}: this server can't enforce it; on its side: pip install 'ossia[grammar]'", param=param)
    held = [
        tool if strict[i] or (called and strict[i] is None) else replace(tool, parameters=dict(ANY_OBJECT))
        for i, tool in enumerate(tools_from_openai(tools))
    ]
    try:
        return grammar.answer(
            wanted.schema, tools=held, tool_choice=tool_choice.removeprefix("="), parallel=parallel
        )  # fmt: skip
    except UserError as error:
        raise ApiError(str(error), param=_param_of(error, wanted, held)) from None


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, Mapping) else {}


def _param_of(error: UserError, wanted: Format, tools: Sequence[Tool]) -> str:
    """The field that an error of the compiler is about: it begins with the tool's or the format's place."""
    for index, tool in enumerate(tools):
        if str(error).startswith(f"tools.{tool.name}."):
            return f"tools[{index}].function.parameters"
    return wanted.param
