"""Questions that are hard in the head and easy with Python, over several turns with Harmony's `python` tool.

```text
assistant to=python (analysis)  code  --> Jail.session of the episode --> python to=assistant (analysis)  output
assistant (final)               the number: the reward is 1 if it is right, else 0
```
The variables of a session stay until the episode ends. What the tool says is never trained. Nothing but the answer is
paid: whether and how often the tool is asked is for the policy to learn; `rl.max_turns` bounds it. Form of calls and
results: OpenAI's Harmony guide, "Built-in tools".
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ossia.errors import RecipeError
from ossia.harmony.messages import Message
from ossia.rl.env import Split, Step, Task, Turn, final
from ossia.rl.envs.procedural import held_out
from ossia.rl.jail import Jail, Jails, Limits, Session

_ENDS = {
    "timeout": "it took too long",
    "memory": "it used too much memory",
    "crash": "its process ended",
    "protocol": "its process broke off",
}
_ASK = "{question} Answer with the number alone."


def call(code: str, *, thinking: str | None = None) -> Turn:
    """A turn that thinks (where given) and calls the tool: for tests and to make rows of."""
    thought = (Message("assistant", thinking, channel="analysis"),) if thinking is not None else ()
    asked = Message("assistant", code, channel="analysis", recipient="python", content_type="code")
    return Turn((*thought, asked), "<|call|>")


def code_called(turn: Turn) -> str | None:
    """The code of the one well-formed call of `python` that ends a turn, as `<|call|>` says; otherwise None."""
    if turn.problems or turn.stop != "<|call|>" or not turn.messages:
        return None
    *before, last = turn.messages
    thinking = all(m.channel in ("analysis", "commentary") and m.recipient is None for m in before)
    called = last.recipient == "python" and last.channel in ("analysis", "commentary")
    return last.content if thinking and called else None


@dataclass(slots=True)
class ToolEpisode:
    """One attempt: calls are answered, an answer is judged, and anything else ends it."""

    jail: Jail
    answer: str
    seed: int
    limits: Limits
    most_characters: int
    session: Session | None = None
    lost: str = ""  # how the session before this one ended, until that was told

    def step(self, turn: Turn) -> Step:
        """See Episode."""
        code = code_called(turn)
        figures = dict.fromkeys(("calls", "tool_errors", "tool_timeouts", "answered"), 0.0)
        if code is None:
            given = turn.answer()
            return Step(reward=float(given == self.answer), metrics=figures | {"answered": float(given is not None)})
        text, failure = self._run(code)
        result = Message("tool", text, channel=turn.messages[-1].channel, recipient="assistant", name="python")
        figures |= {"calls": 1.0, "tool_errors": float(failure is not None)}
        figures["tool_timeouts"] = float(failure == "timeout")
        return Step((result,), terminated=False, metrics=figures)

    def close(self) -> None:
        """See Episode."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def _run(self, code: str) -> tuple[str, str | None]:
        """What the tool answers, and how the code failed."""
        told, session = "", self.session
        if session is None:
            session = self.session = self.jail.session(self.limits, seed=self.seed)
            told, self.lost = self.lost, ""
        outcome = session.run(code)
        printed = outcome.value if isinstance(outcome.value, str) else ""
        error = self._capped(outcome.detail)
        if session.ended:
            why = _ENDS.get(outcome.failure or "", "it ended")
            error = f"The code was stopped: {why}. All variables are gone; the next call starts anew."
            self.lost = f"[A new session: in the one before, {why}, and its variables are gone.]"
            self.close()
        text = "\n".join(part.rstrip("\n") for part in (told, self._capped(printed), error) if part)
        return text or "[no output]", outcome.failure

    def _capped(self, text: str) -> str:
        hidden = len(text) - self.most_characters
        return f"{text[: self.most_characters]}\n[{hidden:,} more characters]" if hidden > 0 else text


@dataclass(frozen=True, slots=True)
class ToolPython:
    """Arithmetic, number theory, counting and lists, with the tool.

    jails    where its code runs
    digits   of the numbers in the questions: how hard they are in the head
    kind     one of KINDS, or all of them
    seconds  of CPU that one call may use
    output   characters of a call's output that the model is shown
    """

    jails: Jails
    digits: int = 5
    kind: str = "all"
    seconds: float = 2.0
    output: int = 2000

    def __post_init__(self) -> None:
        if not 2 <= self.digits <= 12:
            raise RecipeError(f"env.tool_python: `digits` is {self.digits}; allowed: 2 to 12")
        if self.kind not in ("all", *KINDS):
            raise RecipeError(f"env.tool_python: `kind` is {self.kind!r}; allowed: all, {', '.join(KINDS)}")
        if not 0.1 <= self.seconds <= 30:
            raise RecipeError(f"env.tool_python: `seconds` is {self.seconds:g}; allowed: 0.1 to 30")
        if not 100 <= self.output <= 20_000:
            raise RecipeError(f"env.tool_python: `output` is {self.output}; allowed: 100 to 20000")
        self.jails.get("compute")

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """See Env. `info` holds the answer and a program that prints it."""
        rng = random.Random(f"tool_python {split} {seed}")
        kinds = list(KINDS.values()) if self.kind == "all" else [KINDS[self.kind]]
        while True:
            question, answer, code = rng.choice(kinds)(rng, self.digits)
            if (split == "eval") == held_out(answer, question):
                row = {
                    "messages": [{"role": "user", "content": _ASK.format(question=question)}],
                    "builtin_tools": ["python"],
                }
                yield Task(row, {"answer": answer, "code": code}, question)

    def open(self, task: Task, seed: int) -> ToolEpisode:
        """See Env."""
        limits = Limits(cpu_s=self.seconds, wall_s=3 * self.seconds, total_s=20 * self.seconds)
        return ToolEpisode(self.jails.get("compute"), task.info["answer"], seed, limits, self.output)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """See Env. Of one turn; `call` of the task's own code is the one before it."""
        answer, code = task.info["answer"], task.info["code"]
        near = str(int(answer) + 1)
        wrong = [final(near), final(f"{answer} or {near}"), final(f"{answer}."), final(f"0{answer}"), final("")]
        return final(answer), [*wrong, final(code), final(task.name), call(code), Turn((), None)]


# Each makes a question, its answer, and a program that prints it, from numbers of about so many digits.
Kind = Callable[[random.Random, int], tuple[str, str, str]]


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _numbers(rng: random.Random, digits: int) -> list[int]:
    return [rng.randrange(1, 10 ** min(digits, 4)) for _ in range(rng.randint(12, 24))]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _product(rng: random.Random, digits: int) -> tuple[str, str, str]:
    a, b = _number(rng, digits), _number(rng, digits)
    return f"What is {a} * {b}?", str(a * b), f"print({a} * {b})"


def _power(rng: random.Random, digits: int) -> tuple[str, str, str]:
    base, exponent, modulus = _number(rng, digits), rng.randint(50, 999), _number(rng, digits)
    question = f"What is the remainder of {base} to the power of {exponent} divided by {modulus}?"
    return question, str(pow(base, exponent, modulus)), f"print(pow({base}, {exponent}, {modulus}))"


def _digit_sum(rng: random.Random, digits: int) -> tuple[str, str, str]:
    base, exponent = rng.randint(2, 99), rng.randint(10 * digits, 20 * digits)
    answer = sum(map(int, str(base**exponent)))
    question = f"What is the sum of the decimal digits of {base} to the power of {exponent}?"
    return question, str(answer), f"print(sum(map(int, str({base} ** {exponent}))))"


def _common_divisor(rng: random.Random, digits: int) -> tuple[str, str, str]:
    factor = _number(rng, max(2, digits // 2))
    a, b = (factor * _number(rng, digits) for _ in range(2))
    question = f"What is the greatest common divisor of {a} and {b}?"
    return question, str(math.gcd(a, b)), f"import math\nprint(math.gcd({a}, {b}))"


def _primes(rng: random.Random, digits: int) -> tuple[str, str, str]:
    low = _number(rng, min(digits, 5))
    high = low + rng.randint(60, 200)
    answer = sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(max(2, low), high + 1))
    question = f"How many prime numbers are there from {low} to {high}, both included?"
    test = f"sum(n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1)) for n in range({low}, {high + 1}))"
    return question, str(answer), f"print({test})"


def _multiples(rng: random.Random, digits: int) -> tuple[str, str, str]:
    low, a, b = _number(rng, min(digits, 5)), rng.randint(3, 12), rng.randint(13, 30)
    high = low + rng.randint(500, 5000)
    answer = sum(n % a == 0 and n % b != 0 for n in range(low, high + 1))
    question = f"How many whole numbers from {low} to {high}, both included, are divisible by {a} but not by {b}?"
    return question, str(answer), f"print(sum(n % {a} == 0 and n % {b} != 0 for n in range({low}, {high + 1})))"


def _list_median(rng: random.Random, digits: int) -> tuple[str, str, str]:
    numbers = sorted({*_numbers(rng, digits)})
    numbers = rng.sample(numbers, len(numbers) - (len(numbers) % 2 == 0))
    question = f"What is the median of these numbers: {_listed(numbers)}?"
    return question, str(statistics.median(numbers)), f"import statistics\nprint(statistics.median({numbers}))"


def _list_sum(rng: random.Random, digits: int) -> tuple[str, str, str]:
    numbers, divisor = _numbers(rng, digits), rng.randint(2, 5)
    answer = sum(n * n for n in numbers if n % divisor)
    question = f"What is the sum of the squares of those of these numbers that {divisor} doesn't divide: "
    code = f"print(sum(n * n for n in {numbers} if n % {divisor}))"
    return f"{question}{_listed(numbers)}?", str(answer), code


KINDS: Mapping[str, Kind] = {
    "product": _product,
    "power": _power,
    "digit_sum": _digit_sum,
    "divisor": _common_divisor,
    "primes": _primes,
    "multiples": _multiples,
    "median": _list_median,
    "squares": _list_sum,
}
