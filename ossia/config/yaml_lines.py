"""YAML text -> plain values that remember which line they came from.

Own loader on top of PyYAML's composer because `yaml.safe_load` forgets lines, lets a repeated key win in silence, and
reads by YAML 1.1: `1e-5` as text, `no` as false, `2025-06-28` as a date. Here scalars are read as in YAML 1.2's core
schema: null, true and false, numbers with or without a point or exponent; everything else is text. What the dumper
writes is read back as the same value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MOST_LEVELS = 50  # a recipe has 6; PyYAML's composer recurses and would overflow Python's stack
_SCALARS: tuple[tuple[str, str, str], ...] = (  # tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9](_?[0-9])*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


@dataclass(frozen=True, slots=True)
class Found:
    """One thing wrong with a file's YAML: the line it is in (counted from 1), what it is, and the key it is about."""

    line: int
    message: str
    path: KeyPath = ()


@dataclass(frozen=True, slots=True)
class Parsed:
    """A YAML document: its value, the line of every key and list entry in it, and what was wrong."""

    value: Any
    lines: dict[KeyPath, int]
    problems: tuple[Found, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # none of YAML 1.1's


class _Dumper(yaml.SafeDumper):  # keeps YAML 1.1's too, so that text that either would misread is quoted
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indents list entries under their key."""
        super().increase_indent(flow, False)


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        # PyYAML looks an empty scalar up under "", everything else under its first character.
        _regexp, _starts = re.compile(rf"(?:{_pattern})\Z"), ["" if c == "\0" else c for c in _first]
        _class.add_implicit_resolver(_TAG + _tag, _regexp, _starts)


def parse_yaml(text: str) -> Parsed:
    """Reads one YAML document.

    text     the whole file
    Returns  its value (None for an empty document), the line of each key path, and the problems found: bad
             syntax, a key given twice, a tag, a key that is no plain text, too many levels; nothing is raised
    """
    try:
        for line in _lines_that_are_too_deep(text):
            return Parsed(None, {}, (Found(line, f"nested deeper than {_MOST_LEVELS} levels"),))
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        return Parsed(None, {}, (Found(line, f"not valid YAML: {what}"),))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Parsed(None, {}, (Found(line, f"not valid YAML: {error.reason} (U+{error.character:04X})"),))
    builder = _Builder(loader)
    value = builder.build(node, ()) if node is not None else None
    return Parsed(value, builder.lines, tuple(builder.problems))


def _lines_that_are_too_deep(text: str) -> Iterator[int]:
    """The lines (counted from 1) in which a list or mapping begins that is inside too many others."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MOST_LEVELS:
                yield event.start_mark.line + 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text as a scalar; YAML's rarer line ends are escaped, which PyYAML would write as they are and lose."""
    style = '"' if any(end in text for end in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Plain values (mappings, lists, text, numbers, booleans, None) as YAML that `parse_yaml` reads back as equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Builder:
    """Walks composed nodes into values, noting lines and problems as it goes."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Found] = []
        self._resolve = loader.resolve
        self._open: set[int] = set()  # nodes being built: an alias to one of them would never end

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if id(node) in self._open:
            self.problems.append(Found(line, f"`{dotted(path)}` contains itself through an alias", path))
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, path)
            if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
                self.problems.append(Found(line, f"tag `{node.tag}` is not used in recipes; write plain values", path))
            if isinstance(node, yaml.SequenceNode):
                return [self.build(entry, (*path, i)) for i, entry in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Found(line, "a key must be plain text"))
                continue
            key = key_node.value
            here = (*path, key)
            if key == "<<" and key_node.style is None:
                self.problems.append(Found(line, "`<<` merges keys, which Ossia does not do; write them out here"))
                continue
            if key in values:
                first = self.lines[here]
                self.problems.append(
                    Found(line, f"key `{dotted(here)}` is given twice, first in line {first}; keep one", here)
                )
                continue
            self.lines[here] = line
            values[key] = self.build(value_node, here)
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, plain, line = node.value, node.style is None, node.start_mark.line + 1
        tag = self._resolve(yaml.ScalarNode, text, (plain, not plain))
        if node.tag != tag:
            self.problems.append(Found(line, f"tag `{node.tag}` is not used in recipes; write plain values", path))
        if tag == f"{_TAG}null":
            return None
        if tag == f"{_TAG}bool":
            return text.lower() == "true"
        if tag == f"{_TAG}int":
            try:
                return int(text.replace("_", ""))
            except ValueError:  # Python's own limit, against inputs that would take it minutes
                self.problems.append(Found(line, f"a number of {len(text):,} digits; no key takes one as long", path))
                return 1  # which most keys take, so that nothing more is said
        if tag == f"{_TAG}float":
            return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        return text


def dotted(path: KeyPath) -> str:
    """A key path as people write it: ("data", 0, "path") -> "data.0.path"; the whole document is "(top)"."""
    return ".".join(str(piece) for piece in path) or "(top)"
