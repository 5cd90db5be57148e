"""JSON that matches a JSON Schema, as a rule for the next token: which ids can still lead to a match.

llguidance does the work. Of the two libraries tried it is the one without dependencies (the other brings transformers
and triton), takes plain token bytes, and refuses a keyword that it can't enforce instead of letting it pass. It gives
up the whole process for a schema that is nested too deep, so that is checked before. Letters: V vocabulary.

Departures from JSON Schema, all but the last narrower: properties come in the schema's order, the others after them;
`format` is enforced; between two symbols stand at most 64 characters of white space, or a weak model could go on for
ever; names that only `additionalProperties` or `patternProperties` allow may come twice, and count twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ossia.errors import MissingExtraError, UserError
from ossia.harmony.vocab import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

CACHE_ENTRIES = 256
MAX_DEPTH = 100  # of a schema's nested objects and lists
MAX_LEVELS = 1000  # the same through its references; the library overruns an 8 MiB stack at some 2,400
_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}",
    "item_separator": ",",
    "key_separator": ":",
}
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # their keys are no keywords
_VALUES = ("const", "enum", "default", "examples")  # JSON values, not schemas
_UNSUPPORTED = "Unimplemented keys: "
_REASONS = {
    "oneOf": "the schemas of a oneOf don't exclude each other; use anyOf",
    "min/maxProperties": "minProperties and maxProperties need every name in `properties` to be in `required`",
}


class JsonCompiler:
    """Compiles schemas over one vocabulary, and remembers what it compiled: an agent sends the same tools every turn.

    num_rows  V, the rows of the model's head; those beyond the vocabulary are never allowed
    Raises    MissingExtraError if llguidance isn't installed
    """

    def __init__(self, vocab: Vocabulary, num_rows: int) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "answers and tool calls that match a JSON Schema need llguidance: pip install 'ossia[grammar]'"
            ) from error
        assert num_rows >= vocab.size, (num_rows, vocab.size)
        self._matcher = llguidance.LLMatcher
        self._num_rows, self._end = num_rows, vocab.special["<|return|>"]
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(vocab, num_rows)))
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: dict[str, LLMatcher] = {}

    def compile(self, schema: Mapping[str, Any], where: str) -> JsonText:
        """The beginning of a JSON text that matches `schema`; write into copies of it only.

        where   names the schema in errors
        Raises  UserError for a schema that is wrong, that nothing can match, or with a keyword that can't be enforced
        """
        _check_depth(schema, where)
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: can't be written as JSON: {error}") from None
        start = self._compiled.get(text)
        if start is None:
            start = self._compile(text, schema, where)
            if len(self._compiled) >= CACHE_ENTRIES:
                self._compiled.clear()
            self._compiled[text] = start
        return JsonText(start, self._num_rows, self._end)

    def _compile(self, text: str, schema: Mapping[str, Any], where: str) -> LLMatcher:
        try:
            grammar = self._matcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        except ValueError as error:
            raise UserError(f"{where}: is not a JSON Schema: {error}") from None
        matcher = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UserError(_explain(_words(matcher.get_error()), schema, where))
        matcher.compute_bitmask()
        if matcher.is_error():
            raise UserError(f"{where}: nothing can match this schema; does a $ref lead back to itself?")
        return matcher


class JsonText:
    """A JSON text that is being written, token by token."""

    def __init__(self, matcher: LLMatcher, num_rows: int, end: int) -> None:
        self._matcher, self._num_rows, self._end = matcher, num_rows, end
        self._mask_V: np.ndarray | None = None

    def mask(self) -> tuple[Tensor, bool]:
        """Which ids can come next, (V,) bool, a new tensor; and whether the text can end here. No special token is in.

        Raises  UserError if sampling can't go on: the schema is more than the library's limits allow, or leads nowhere
        """
        packed = np.empty((self._num_rows + 31) // 32, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(packed.ctypes.data, packed.nbytes)
        if self._matcher.is_error():
            raise self._failure()
        self._mask_V = np.unpackbits(packed.view(np.uint8), count=self._num_rows, bitorder="little").view(np.bool_)
        complete = bool(self._mask_V[self._end])
        self._mask_V[self._end] = False
        return torch.from_numpy(self._mask_V), complete

    def push(self, token: int) -> None:
        """Take the next id, which the last `mask` allowed. Raises as `mask`."""
        allowed = self._mask_V is None or bool(self._mask_V[token])
        if not self._matcher.consume_token(token):
            assert allowed, f"token {token} was not allowed"
            raise self._failure()
        self._mask_V = None

    @property
    def complete(self) -> bool:
        return self._matcher.is_accepting()

    def copy(self) -> JsonText:
        """An independent one in the same state."""
        return JsonText(self._matcher.deep_copy(), self._num_rows, self._end)

    def _failure(self) -> UserError:
        reason = _words(self._matcher.get_error()).removeprefix("Parser Error: ")
        return UserError(
            f"sampling can't go on under this request's JSON Schema: {reason}\n"
            "  next: simplify the schema; perhaps one of its references leads back to itself"
        )


class _Tokens:
    """A vocabulary as the library reads one; rows without a token are empty, and never allowed."""

    def __init__(self, vocab: Vocabulary, num_rows: int) -> None:
        self._vocab = vocab
        self.eos_token_id, self.bos_token_id = vocab.special["<|return|>"], None
        self.special_token_ids = sorted(vocab.special.values())
        self.tokens = [vocab.decode_bytes((number,)) for number in range(vocab.size)]
        self.tokens += [b""] * (num_rows - vocab.size)

    def __call__(self, text: bytes) -> list[int]:
        return self._vocab.encode(text.decode("utf-8"))


def _check_depth(schema: Mapping[str, Any], where: str) -> None:
    """Refuse what the library would overrun its stack with: its recursion follows the nesting and every reference."""
    depth = _depth(schema)
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: is nested {depth} deep; allowed: {MAX_DEPTH} objects and lists inside each other")
    targets = {
        ref for node in _containers(schema) if isinstance(node, Mapping) and isinstance(ref := node.get("$ref"), str)
    }
    levels = depth + sum(_depth(_target(schema, ref)) for ref in targets)
    if levels > MAX_LEVELS:
        raise UserError(
            f"{where}: its {len(targets)} references lead {levels:,} levels deep; allowed: {MAX_LEVELS:,}\n"
            "  next: send a smaller schema, or one with fewer definitions"
        )


def _depth(value: Any) -> int:
    """How many objects and lists are inside each other; without recursion, as nothing is known of the value yet."""
    layer, depth = [value], 0
    while layer := [node for node in layer if isinstance(node, Mapping | list)]:
        layer = [child for node in layer for child in (node.values() if isinstance(node, Mapping) else node)]
        depth += 1
    return depth


def _containers(value: Any) -> Iterator[Mapping[str, Any] | list[Any]]:
    """Every object and list in a JSON value of checked depth."""
    if isinstance(value, Mapping | list):
        yield value
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _containers(child)


def _target(schema: Mapping[str, Any], ref: str) -> Any:
    """What a reference like `#/$defs/a` leads to; the whole schema where it is of another form, or leads nowhere."""
    node: Any = schema
    for part in ref.removeprefix("#").strip("/").split("/") if ref.startswith("#/") else ():
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, Mapping) else None
    return schema if node is None else node


def _words(error: str) -> str:
    """The library's message on one line, without what it adds for its own debugging."""
    return " ".join(error.partition("\n<")[0].split())


def _explain(error: str, schema: Mapping[str, Any], where: str) -> str:
    """The library's refusal in our words, with the place where there is one."""
    if error.startswith(_UNSUPPORTED):
        keyword = str(json.loads(error.removeprefix(_UNSUPPORTED))[0])
        place = next(_places(schema, keyword), keyword)
        return (
            f"{where}.{place}: the keyword {keyword} can't be enforced\n  next: remove it, and check the answer for it"
        )
    reason = next((ours for theirs, ours in _REASONS.items() if error.startswith(theirs)), error)
    return f"{where}: this JSON Schema can't be enforced: {reason}"


def _places(schema: Any, keyword: str, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Where a schema uses a keyword: `properties.tags.uniqueItems`."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _places(item, keyword, (*path, str(index)))
    if not isinstance(schema, Mapping):
        return
    if keyword in schema:
        yield ".".join((*path, keyword))
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            for name, inner in value.items():
                yield from _places(inner, keyword, (*path, key, name))
        elif key not in _VALUES:
            yield from _places(value, keyword, (*path, key))
