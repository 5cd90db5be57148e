"""What may stand in a request's body. A field that isn't here is an error: nothing is ignored in silence.

Beside OpenAI's own fields stand `top_k` and `min_p`. Fields of type Any are taken and have no effect: they are about
OpenAI's accounts, stores and caches. A null says nothing, wherever it stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ossia.web.protocol.errors import ApiError

MOST_CHOICES, MOST_STOPS, MOST_TOP_LOGPROBS = 128, 16, 20
Number = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """An object inside a body."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Part):
    """`stream_options`."""

    include_usage: bool | None = Field(None, description="true or false")
    include_obfuscation: bool | None = Field(None, description="true or false (nothing is padded here)")


class SamplingFields(Part):
    """How tokens are drawn: the same for every route."""

    model: str = Field(description="a name that /v1/models lists")
    stream: bool | None = Field(None, description="true or false")
    temperature: Number | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: Number | None = Field(None, ge=0, le=1, description="a share from 0 to 1")
    top_k: int | None = Field(None, ge=0, description="0 (all tokens) or a positive number")
    min_p: Number | None = Field(None, ge=0, le=1, description="a share from 0 to 1")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="a whole number of 64 bits")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description='an object like {"token id": number from -100 to 100}'
    )
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @property
    def penalties(self) -> tuple[float, float]:
        """Of frequency and of presence; a response has no fields for them."""
        return 0.0, 0.0


class ChoiceFields(SamplingFields):
    """What chat and plain completions have in common."""

    stream_options: StreamOptions | None = Field(None, description='an object like {"include_usage": true}')
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description=f"a whole number from 1 to {MOST_CHOICES}")
    max_tokens: int | None = Field(None, ge=1, description="a positive number")
    stop: str | list[str] | None = Field(None, description=f"a text, or a list of up to {MOST_STOPS} texts")
    frequency_penalty: Number | None = Field(None, ge=-2, le=2, description="a number from -2 to 2")
    presence_penalty: Number | None = Field(None, ge=-2, le=2, description="a number from -2 to 2")

    @property
    def penalties(self) -> tuple[float, float]:
        """Of frequency and of presence."""
        return self.frequency_penalty or 0.0, self.presence_penalty or 0.0

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts, however they were given. Raises ApiError for an empty one, or for too many."""
        texts = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(texts) or len(texts) > MOST_STOPS:
            raise ApiError(f"stop: found {self.stop!r}; allowed: up to {MOST_STOPS} texts, none empty", param="stop")
        return texts


Effort = Literal["low", "medium", "high"]
EFFORTS = "low, medium or high"


class ChatBody(ChoiceFields):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, description="a list of messages, each an object; at least one")
    max_completion_tokens: int | None = Field(None, ge=1, description="a positive number")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP_LOGPROBS, description=f"a whole number from 0 to {MOST_TOP_LOGPROBS}"
    )
    response_format: dict[str, Any] | None = Field(
        None, description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {...}}'
    )
    tools: list[dict[str, Any]] | None = Field(None, description="a list of function tools")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description='"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    reasoning_effort: Effort | None = Field(None, description=EFFORTS)
    modalities: list[Literal["text"]] | None = Field(None, description='["text"]')
    verbosity: Literal["medium"] | None = Field(None, description="medium (gpt-oss has no other)")


class CompletionBody(ChoiceFields):
    """POST /v1/completions: text or ids, continued as they are, with no conversation around them."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, a list of token ids, or a list of either"
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS, description=f"0 to {MOST_TOP_LOGPROBS}")
    echo: bool | None = Field(None, description="true or false")
    max_tokens: int | None = Field(None, ge=0, description="a positive number, or with echo also 0")
    best_of: Literal[1] | None = Field(None, description="1 (ask for `n` and choose yourself)")
    suffix: Literal[""] | None = Field(None, description="nothing (gpt-oss doesn't fill in)")


class Reasoning(Part):
    """`reasoning` of a response; a summary is never made, the reasoning itself is in the answer."""

    effort: Effort | None = Field(None, description=EFFORTS)
    summary: Any = None
    generate_summary: Any = None


class TextFormat(Part):
    """`text` of a response."""

    format: dict[str, Any] | None = Field(
        None, description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", ...}'
    )
    verbosity: Literal["medium"] | None = Field(None, description="medium (gpt-oss has no other)")


class ResponseBody(SamplingFields):
    """POST /v1/responses. The server keeps no responses, so each request brings the whole conversation."""

    input: str | list[dict[str, Any]] = Field(description="a text, or a list of items")
    instructions: str | None = Field(None, description="a text")
    max_output_tokens: int | None = Field(None, ge=1, description="a positive number")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP_LOGPROBS, description=f"a whole number from 0 to {MOST_TOP_LOGPROBS}"
    )
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = Field(
        None, description="message.output_text.logprobs; and reasoning.encrypted_content, without effect"
    )
    reasoning: Reasoning | None = Field(None, description='an object like {"effort": "low"}')
    text: TextFormat | None = Field(None, description='an object like {"format": {"type": "text"}}')
    tools: list[dict[str, Any]] | None = Field(None, description="a list of function tools")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description='"none", "auto", "required" or {"type": "function", "name": ...}'
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='an object like {"include_obfuscation": false}')
    truncation: Literal["disabled"] | None = Field(None, description="disabled")
    background: Literal[False] | None = Field(None, description="false")


Body = TypeVar("Body", bound=SamplingFields)


def read_body(kind: type[Body], data: Any) -> Body:
    """A body from its parsed JSON. Raises ApiError naming the field, what was found and what is allowed."""
    if not isinstance(data, dict):
        raise ApiError(f"the body is {_seen(data)}; expected a JSON object")
    try:
        return kind.model_validate({name: value for name, value in data.items() if value is not None})
    except ValidationError as error:
        raise _refused(kind, data, error) from None


def _refused(kind: type[Body], data: Mapping[str, Any], error: ValidationError) -> ApiError:
    finding = error.errors(include_url=False)[0]
    if finding["type"] == "extra_forbidden":
        place = finding["loc"]
        name = str(place[-1])
        param = ".".join(map(str, place))
        near = difflib.get_close_matches(name, list(kind.model_fields), 1) if len(place) == 1 else []
        maybe = f"; did you mean {near[0]}?" if near else ""
        return ApiError(f"{param}: this server has no such field{maybe}", param=param, code="unknown_parameter")
    part: type[BaseModel] = kind
    value: Any = data
    names: list[str] = []
    allowed = None
    for step in finding["loc"]:
        if not isinstance(step, str) or step not in part.model_fields:
            break
        names.append(step)
        allowed = part.model_fields[step].description
        value = value.get(step) if isinstance(value, Mapping) else None
        part = _PARTS.get(step, Part)
    param = ".".join(names)
    if finding["type"] == "missing":
        return ApiError(f"{param}: missing; it has to be {allowed}", param=param, code="missing_required_parameter")
    return ApiError(f"{param}: found {_seen(value)}; allowed: {allowed}", param=param, code="invalid_value")


_PARTS: dict[str, type[BaseModel]] = {"stream_options": StreamOptions, "reasoning": Reasoning, "text": TextFormat}


def _seen(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
