"""Tools as users write them: what is misspelt or no JSON Schema is refused, what JSON Schema allows passes."""

from __future__ import annotations

from typing import Any

import pytest

from ossia.errors import HarmonyError
from ossia.harmony import Tool, tools_from_openai


def function(**keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **keys}}


def schema(**keys: Any) -> dict[str, Any]:
    return function(parameters={"type": "object", **keys})


def of_city(**keys: Any) -> dict[str, Any]:
    return schema(properties={"city": keys})


def nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


PARAMETERS = "tools[0].function.parameters"
CITY = f"{PARAMETERS}.properties.city"


@pytest.mark.parametrize(
    ("tool", "field", "said"),
    [
        (function(paramters={}), "tools[0].function.paramters", "did you mean parameters?"),
        (function(desciption="x"), "tools[0].function.desciption", "did you mean description?"),
        ({"name": "f", "paramters": {"type": "object"}}, "tools[0].paramters", "did you mean parameters?"),
        ({**function(), "fuction": {}}, "tools[0].fuction", "did you mean function?"),
        ({"typ": "function", "name": "f"}, "tools[0].typ", "did you mean type?"),
        ({**function(), "parameters": {}}, "tools[0].parameters", "beside `function`; it belongs inside it"),
        ({**function(), "strict": True}, "tools[0].strict", "beside `function`; it belongs inside it"),
        ({"name": "f", "input_schema": {}}, "tools[0].input_schema", "allowed: function, type, name, description"),
        ({"name": "functions."}, "tools[0].name", "expected a name"),
        (schema(proprties={"x": {}}), f"{PARAMETERS}.proprties", "did you mean properties? (if you didn't: call it x-"),
        (schema(Properties={}), f"{PARAMETERS}.Properties", "did you mean properties?"),
        (schema(requried=["x"]), f"{PARAMETERS}.requried", "did you mean required?"),
        (of_city(tpye="string"), f"{CITY}.tpye", "did you mean type?"),
        (of_city(enumm=["a"]), f"{CITY}.enumm", "did you mean enum?"),
        (of_city(anyOf=[{"desciption": "x"}]), f"{CITY}.anyOf[0].desciption", "did you mean description?"),
        (of_city(items={"itmes": {}}), f"{CITY}.items.itmes", "did you mean items?"),
        (schema(**{"$defs": {"a": {"titel": "A"}}}), f"{PARAMETERS}.$defs.a.titel", "did you mean title?"),
        (of_city(type="str"), f"{CITY}.type", "did you mean string?"),
        (of_city(type="STRING"), f"{CITY}.type", "did you mean string?"),
        (of_city(type=["string", "nul"]), f"{CITY}.type", "did you mean null?"),
        (of_city(type={"a": 1}), f"{CITY}.type", "expected one of object"),
        (of_city(type="string", required=True), f"{CITY}.required", "expected a list of names, found True"),
        (of_city(enum="a"), f"{CITY}.enum", "expected a list of values, found 'a'"),
        (of_city(description=["a"]), f"{CITY}.description", "expected text, found list"),
        (of_city(nullable="true"), f"{CITY}.nullable", "expected true or false, found 'true'"),
        (schema(properties=["city"]), f"{PARAMETERS}.properties", "expected an object of schemas, found list"),
        (schema(properties={"city": "string"}), CITY, "expected a schema, found 'string'"),
        (schema(properties={"city": {}}, required=["ctiy"]), f"{PARAMETERS}.required[0]", "did you mean city?"),
        (schema(properties={"city": {}}, required=[1]), f"{PARAMETERS}.required[0]", "the name of a property, found 1"),
        (schema(city={"type": "string"}), f"{PARAMETERS}.city", "it belongs under `properties`"),
        (function(parameters={"city": {"about": "x"}}), PARAMETERS, "expected a JSON Schema"),
        (schema(properties={"x": nested(100)}), f"{PARAMETERS}.properties.x" + ".items" * 63, "inside 64 others"),
        (of_city(default={1, 2}), f"{CITY}.default", "can't be written as JSON"),
    ],
)
def test_a_tool_that_would_be_misread_is_refused_by_its_field(tool: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(HarmonyError) as caught:
        tools_from_openai([tool])
    assert caught.value.field == field
    assert said in str(caught.value)


EVERY_KEYWORD = {
    "type": "object",
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {"a": {"type": "string"}},
    "properties": {
        "city": {"type": "string", "pattern": "a+", "minLength": 3, "format": "date", "x-order": 1, "example": "a"},
        "type": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "const": None, "default": None},
        "proprties": {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": 9, "multipleOf": 3},
        "any": True,
        "list": {"type": "array", "items": {"not": {}}, "prefixItems": [{}], "uniqueItems": True},
    },
    "required": ["city", "type"],
    "additionalProperties": {"type": "string"},
    "allOf": [{"if": {}, "then": {}, "else": {}}],
}


def test_what_json_schema_openai_and_transformers_know_passes_and_is_kept() -> None:
    notes: list[str] = []
    tools = [
        function(parameters=EVERY_KEYWORD, strict=True, description="d", **{"return": {"type": "string"}}),
        {"type": "function", "name": "bare", "description": "d", "parameters": {}, "strict": False},
        {"name": "barer"},
    ]
    found = tools_from_openai(tools, notes)
    assert found == (Tool("f", "d", EVERY_KEYWORD), Tool("bare", "d", {}), Tool("barer", "", None))
    assert notes == []


def test_what_is_legal_but_says_nothing_to_the_model_is_noted() -> None:
    notes: list[str] = []
    untyped = function(parameters={"properties": {"x": {"type": "string", "widget": "box"}}, "required": ["other"]})
    assert tools_from_openai([untyped], notes)[0].parameters == untyped["function"]["parameters"]
    assert notes == [
        "tool schemas with the key `widget`, which JSON Schema doesn't know; it isn't shown",
        "tool schemas that require `other`, which is none of their properties",
        "tool schemas with properties but without `type: object`, shown to the model as `any`",
    ]


def test_null_is_the_same_as_absent_in_a_tool() -> None:
    filled = {"type": "function", "fuction": None, "function": {"name": "f", "paramters": None, "parameters": None}}
    assert tools_from_openai([filled]) == (Tool("f", "", None),)
    null = function(parameters={"type": "object", "proprties": None, "properties": {"x": {"enum": None}, "y": None}})
    assert tools_from_openai([null])[0].parameters == {"type": "object", "properties": {"x": {}}}
