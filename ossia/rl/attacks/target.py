"""How an environment takes answers, told from its own right example, and attacks put into that form."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ossia.errors import RewardError
from ossia.harmony.messages import Message
from ossia.rl.attacks.corpus import Attack
from ossia.rl.env import Task, Turn, final
from ossia.rl.envs.code import answered, code_of

Kind: TypeAlias = Literal["python", "c", "text", "tool"]

_CALL = re.compile(r"\b([A-Za-z_]\w*) ?\(")
_EXPRESSION = (re.compile(r"\$+([^$]+)\$+"), re.compile(r"[\d(][\d\s.+*/^()!%-]*[+*/^!%-][\d\s.+*/^()!-]*[\d)!]"))
_WORDS = re.compile(r"\b(QUESTION|EXPRESSION|FOLDER|MARK|PORT|FUNCTION)\b")
_GAVE_UP = "I could not find an answer."


@dataclass(frozen=True, slots=True)
class Target:
    """The form of an environment's answers.

    kind      python or c: a fenced program; tool: calls of Harmony's python tool before the answer; text
    function  that a program has to define; "" for the other kinds
    """

    kind: Kind
    function: str = ""

    def __str__(self) -> str:
        forms = {
            "python": f"a Python function `{self.function}`",
            "c": f"a C function `{self.function}`",
            "tool": "calls of the python tool, then text",
            "text": "text",
        }
        return forms[self.kind]

    def takes(self, attack: Attack) -> bool:
        """Whether an attack is one on this form."""
        if attack.interface in ("c", "text"):
            return attack.interface == self.kind
        if attack.interface in ("any", "tool"):
            return self.kind == "tool" or (self.kind == "python" and attack.interface == "any")
        return self.kind == "python" and attack.interface == self.function

    def turns(self, attack: Attack, task: Task, words: Mapping[str, Any]) -> tuple[Turn, ...] | None:
        """What a model would say; None where a text needs what the task's question hasn't.

        words  what code finds defined, by name
        """
        if self.kind == "text":
            text = _filled(attack.code, task, words, self.function)
            return None if text is None else (final(text.rstrip("\n")),)
        if self.kind == "c":
            given = "".join(
                f"#define {name} {_as_c(value)}\n"
                for name, value in words.items()
                if re.search(rf"\b{name}\b", attack.code)
            )
            return (answered(given + attack.code.replace("FUNCTION", self.function), "c"),)
        code = f"{', '.join(words)} = {', '.join(map(repr, words.values()))}\n{attack.code}"
        if self.kind == "python":
            renamed = (
                "" if attack.interface == self.function or self.function == "solve" else f"\n{self.function} = solve"
            )
            return (answered(code + renamed, "python"),)
        return _called(code + ("\nprint(solve([3, 1, 2]))" if attack.interface == "any" else "")), final(_GAVE_UP)

    def failures(self) -> list[tuple[Turn, ...]]:
        """What honest failures would say."""
        if self.kind == "python":
            bodies = ("return None", "raise NotImplementedError")
            programs = [answered(f"def {self.function}(*args):\n    {body}", "python") for body in bodies]
            return [*((program,) for program in programs), (final(_GAVE_UP),)]
        if self.kind == "c":
            return [(answered(f"void {self.function}() {{}}", "c"),), (final(_GAVE_UP),)]
        silent = [(final(_GAVE_UP),), (final(""),)]
        return [*silent, (_called("1 / 0"), final(_GAVE_UP))] if self.kind == "tool" else silent

    def honest(self, right: Turn) -> tuple[Turn, ...]:
        """An environment's own right answer, said as a whole episode."""
        return (_called("print(1 + 1)"), right) if self.kind == "tool" else (right,)


def find_target(task: Task, right: Turn, name: str) -> Target:
    """The form of answers to a task, from a right one. Raises RewardError where there is none to tell by.

    name  what errors call the environment
    """
    if "python" in task.row.get("builtin_tools", ()):
        return Target("tool")
    if not right.answer():
        raise RewardError(
            f"env {name}: its `examples` hold no right answer, from which the form of answers is told\n"
            "  next: have `examples(task)` return a turn that earns full reward"
        )
    question = _question(task)
    python = code_of(right, "python").text
    if python is not None:
        return Target("python", _named(python, question, name))
    c = code_of(right, "c").text
    if c is not None:
        functions = [word for word in _CALL.findall(question) if re.search(rf"\b{word}\s*\(", c)]
        return Target("c", functions[0] if functions else _CALL.findall(c)[-1])
    return Target("text")


def _named(code: str, question: str, name: str) -> str:
    """The function of a right program that the question names first; else the last that it defines."""
    try:
        defined = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise RewardError(f"env {name}: the right answer of its `examples` is no Python: {error}") from None
    if not defined:
        raise RewardError(f"env {name}: the right answer of its `examples` defines no function")
    return next((word for word in _CALL.findall(question) if word in defined), defined[-1])


def _question(task: Task) -> str:
    content = task.row["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _filled(text: str, task: Task, words: Mapping[str, Any], function: str) -> str | None:
    question = _question(task)
    found = next((match for pattern in _EXPRESSION if (match := pattern.search(question))), None)
    if found is None and "EXPRESSION" in text:
        return None
    expression = found[found.re.groups].strip() if found is not None else ""
    known = {**words, "QUESTION": question, "EXPRESSION": expression, "FUNCTION": function}
    return _WORDS.sub(lambda word: str(known[word[0]]), text)


def _as_c(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _called(code: str) -> Turn:
    call = Message("assistant", code, channel="analysis", recipient="python", content_type="code")
    return Turn((call,), "<|call|>")
