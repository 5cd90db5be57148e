"""The math environment: what is right earns 1, however it is written; a restated question, or two answers, nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from ossia.errors import DataError, RecipeError
from ossia.rl.env import Task, Turn, final, validate
from ossia.rl.envs import make_env
from ossia.rl.envs.math import Math
from ossia.rl.envs.math.decide import decide, may_verify
from ossia.rl.envs.math.text import gold_of, said
from ossia.rl.jail import Jails

ASKED = "What is it? A length in cm, an angle in degrees, a price in dollars, a time in hours or a percent."
# reference, and answers that are right / wrong
PAIRS: list[tuple[str, list[str], list[str]]] = [
    ("42", ["42", "42.0", "+42", "$42$", r"\(42\)", "42.", "**42**", "x = 42", "42 cm", "42 dollars", r"\$42"],
     ["43", "-42", "4 2", "42 or 43", "42, 43", "", "forty-two", "42 m", "42!", "41+1", r"6\cdot 7", "84/2", "42?"]),
    ("-7", ["-7", "−7", "-7.0", "$-7$"], ["7", "--7", "(-7)(1)", "-7 or 7", r"\pm 7"]),
    ("1,250", ["1250", "1,250", "$1{,}250$", "1250.00", r"1.25\times 10^3", "1.25e3"],
     ["125,0", "12,50", "1.250", "1,25", "1, 250", r"12.5\times 10^2"]),
    ("0.5", ["0.5", ".5", "1/2", r"\frac12", r"\dfrac{1}{2}", r"\tfrac12", "0.50"],
     ["2/4", "0.05", "5", "1/2/1", "0.5.0"]),
    (r"\frac{3}{4}", ["3/4", "0.75", r"\frac{3}{4}", r"\frac34", "75%"],
     ["6/8", "3/5", "4/3", "3/0", "34", r"\frac{3}{4}+0"]),
    (r"-\frac{2}{3}", [r"-\frac23", "-2/3", r"\frac{-2}{3}", r"\frac{2}{-3}"], ["2/3", "-0.667", "-0.6666666666"]),
    (r"2\frac{1}{2}", ["2.5", "5/2", r"2\frac12", "2 1/2"], ["21/2", r"1\frac{3}{2}", "2"]),
    (r"0.\overline{3}", ["1/3", r"0.\overline{3}", r"\frac13"], ["0.3", "0.33333333"]),
    ("10\\%", ["10%", r"10\%", "0.1", "1/10", "10"], ["100%", "0.01", "1"]),
    ("90^\\circ", ["90", "90°", "90 degrees", r"90^{\circ}"], ["90 cm", "180", "9"]),
    (r"12\text{ cm}", ["12", "12 cm", r"12\text{ cm}", r"12\ \mathrm{cm}"], ["12 m", "12 km", "0.12 m"]),
    ("(3, 4)", ["(3,4)", r"\left(3,4\right)", "(3.0, 4)", "$(3, 4)$"],
     ["(4,3)", "3,4", "(3,4,5)", "[3,4]", "(3,5)", "34"]),
    ("1, -2", ["1,-2", "-2, 1", "1 and -2", r"1 \text{ or } -2"], ["1", "-2", "1, 2", "1,-2,3", "1,1"]),
    (r"\{1,2,3\}", [r"\{3,2,1\}", r"\{1, 2, 3\}"], [r"\{1,2\}", "(1,2,3)", r"\{1,2,2\}"]),
    ("[1, 5)", ["[1,5)", r"\left[1,5\right)"], ["(1,5)", "[1,5]", "[1,6)"]),
    ("B", ["B", "(B)", "b", r"\text{(B)}", r"\textbf{B}"], ["A", "BC", "A or B", "the B"]),
    ("even", ["even", "Even", r"\text{even}"], ["odd", "even or odd", "not even"]),
    ("x^2+2x+1", ["x^2+2x+1", "1+2x+x^2", "$x^{2} + 2x + 1$", "2x + x^2 + 1"],
     ["(x+1)^2", "(x+1)(x+1)", "x^2+x+x+1", "x^2+1", "(1+x)^2", "y^2+2y+1", "x^2+2x+1+x-x"]),
    ("(x+1)(x-2)", ["(x-2)(x+1)", "(x + 1)(x - 2)"], ["x^2-x-2", "(x+1)(x+2)", "(x+1)"]),
    (r"2\sqrt{3}", [r"2\sqrt3", r"\sqrt{3}\cdot 2", r"2 \sqrt{3}"],
     [r"\sqrt{12}", r"\sqrt{3}+\sqrt{3}", r"3\sqrt{2}", "2"]),
    (r"\frac{\pi}{4}", [r"\pi/4", r"\frac{\pi}{4}", r"0.25\pi", r"\frac{1}{4}\pi"],
     [r"\frac{\pi}{2}", "45", r"\arctan(1)"]),
    ("3+2i", ["3+2i", "2i+3", "3 + 2 i"], ["3-2i", "2+3i", "(3+2i)(1)"]),
    (r"(2\sqrt{2}, \frac{\pi}{3})", [r"(2\sqrt2,\pi/3)", r"\left(2\sqrt{2}, \frac{\pi}{3}\right)"],
     [r"(\sqrt8,\pi/3)", "(2,3)"]),
    ("y = 3x - 2", ["y=3x-2", "3x-2", "-2+3x"], ["y=3x+2", "3x"]),
    (r"\frac{x\sqrt{3}}{3}", [r"\frac{x}{\sqrt{3}}"], ["x"]),
    ("e^{x}+1", ["1+e^x"], ["e^x"]),
    (r"\frac{x^2-1}{x}", [r"x-\frac{1}{x}"], ["x-1"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"(3,\infty)\cup(-\infty,2)"], [r"(-\infty,\infty)"]),
    (r"\frac{x+1}{2}", [r"\frac{1+x}{2}", "(x+1)/2"], [r"\frac{x+2}{1}", "x+1/2"]),
]  # fmt: skip
RIGHT = [(gold, answer) for gold, right, _ in PAIRS for answer in right]
WRONG = [(gold, answer) for gold, _, wrong in PAIRS for answer in wrong]
RESTATED = [  # the question, its answer, and the answer that only says the question again
    (r"Compute \sum_{i=1}^{100} i.", "5050", r"\sum_{i=1}^{100} i"),
    ("What is 5!?", "120", "5!"),
    (r"Find \binom{8}{4}.", "70", r"\binom{8}{4}"),
    (r"Evaluate \int_0^1 2x\,dx.", "1", r"\int_0^1 2x\,dx"),
    (r"What is \gcd(12,18)?", "6", r"\gcd(12,18)"),
    (r"Find \lim_{x\to 0}\frac{\sin x}{x}.", "1", r"\lim_{x\to 0}\frac{\sin x}{x}"),
    (r"What is 17 \bmod 5?", "2", r"17 \bmod 5"),
    ("Compute 2^{10}.", "1024", "2^{10}"),
    ("What is 12/4?", "3", "12/4"),
    ("Write 0.5 as a fraction.", "1/2", "0.5"),
    ("Simplify 6/8.", "3/4", "6/8"),
    ("Expand (x+1)^2.", "x^2+2x+1", "(1+x)^2"),
    ("Factor x^2-x-2.", "(x+1)(x-2)", "x^2-2-x"),
    (r"Simplify \sqrt{12}.", r"2\sqrt{3}", r"\sqrt{12}"),
    (r"Simplify \frac{x^2+x}{x}.", "x+1", r"\frac{x^2+x}{x}"),
    (r"Rationalise \frac{x}{\sqrt{3}}.", r"\frac{x\sqrt{3}}{3}", r"\frac{x}{\sqrt{3}}"),
]
ONLY_THERE = ("0.5", r"\frac{x}{\sqrt{3}}")  # right where the question doesn't say it
BOMB = "10^{10^{10^{10}}}"
FORGED = "__import__('os').write(4, b'1.0')"


@pytest.fixture(scope="module")
def jails() -> Iterator[Jails]:
    with Jails() as made:
        yield made


@pytest.fixture(scope="module")
def math(jails: Jails, tmp_path_factory: pytest.TempPathFactory) -> Math:
    pytest.importorskip("math_verify")
    file = tmp_path_factory.mktemp("math") / "rows.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(60)]
    rows += [{"question": f"Expand (x+{n})^2.", "answer": f"So \\boxed{{x^2+{2 * n}x+{n * n}}}."} for n in range(2, 22)]
    rows += [{"question": f"Halve {n}.", "answer": f"Half of it.\n#### {n / 2}"} for n in range(1, 20, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_env("math", {"data": str(file)}, jails)  # type: ignore[return-value]


def earned(env: Math, gold: str, answer: str, question: str = ASKED) -> float:
    return env.open(Task({}, {"question": question, "answer": gold}, ""), 0).step(final(answer)).reward


def test_there_are_enough_pairs() -> None:
    assert len(RIGHT) + len(WRONG) >= 150


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_a_right_answer_earns_1_however_it_is_written(math: Math, gold: str, answer: str) -> None:
    assert earned(math, gold, f"\\boxed{{{answer}}}") == 1.0
    assert earned(math, gold, answer) == 1.0


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_a_wrong_answer_earns_nothing(math: Math, gold: str, answer: str) -> None:
    assert earned(math, gold, f"\\boxed{{{answer}}}") == 0.0
    assert earned(math, gold, answer) == 0.0


@pytest.mark.parametrize(("question", "gold", "answer"), RESTATED)
def test_a_restated_question_earns_nothing_and_its_answer_does(
    math: Math, question: str, gold: str, answer: str
) -> None:
    assert earned(math, gold, f"\\boxed{{{answer}}}", question) == 0.0
    assert earned(math, gold, f"\\boxed{{{answer}}}", "Say that again.") == 0.0 or answer in ONLY_THERE
    assert earned(math, gold, f"\\boxed{{{gold}}}", question) == 1.0


@pytest.mark.parametrize("gold", ["5", "x^2+1", r"\frac{\pi}{2}", "(1,2)"])
@pytest.mark.parametrize(
    "answer",
    [
        BOMB,
        "9**9**9**9",
        FORGED,
        "9" * 100_000,
        "{" * 5000,
        "." * 100_000,
        "$" * 100_000,
        "\\boxed{" * 20_000 + "}" * 20_000,
        r"\frac{1}{" * 300,
    ],
)
def test_a_bomb_or_a_program_costs_nothing(math: Math, gold: str, answer: str) -> None:
    start = time.perf_counter()
    assert earned(math, gold, f"\\boxed{{{answer}}}") == earned(math, gold, answer) == 0.0
    assert time.perf_counter() - start < 1.0


def test_what_hangs_the_verifier_dies_at_its_limit_and_the_next_answer_is_judged(math: Math) -> None:
    gold = "x^{2^{2}}"  # a tower of exponents in the reference lets one through
    start = time.perf_counter()
    step = math.open(Task({}, {"question": "?", "answer": gold}, ""), 0).step(final("x^{9^{9^{9^{9}}}}"))
    assert step.reward == 0.0
    assert time.perf_counter() - start < 4.0
    assert earned(math, gold, "x^4") in (0.0, 1.0)
    assert earned(math, "x^2+1", "1+x^2") == 1.0


def test_a_program_that_reaches_the_verifier_itself_is_not_run(math: Math) -> None:
    for program in (FORGED, f"[{FORGED}, {FORGED}]", f"x + {FORGED}"):
        assert math._ask("x", program, {}) is False


def test_what_a_verifier_may_see_is_of_the_references_own_kind() -> None:
    assert may_verify("x_{1}+y", "y+x_{1}")
    for given in ("y+x__1", "y+x_{1}!", "y;import x_1", "y+x_1'", "f(x)+y", r"\sin(x_1)+y", "x_1+y+x_1"):
        assert not may_verify("x_{1}+y", given)


def test_only_one_answer_counts() -> None:
    assert said(r"It is \boxed{3}, so \boxed{ 3 }.") == "3"
    assert said(r"\boxed{3} or \boxed{4}") is None
    assert said(r"\boxed{3") is None
    assert said(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert said("The answer is **42**.") == "42"
    assert said("Well, 42") == "Well, 42"


def test_the_reference_is_found_in_a_solution() -> None:
    assert gold_of("3 + 4 = 7\n#### 7") == "7"
    assert gold_of(r"Thus \boxed{2}, and then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert gold_of(" 12 ") == "12"


def test_tasks_hold_and_questions_of_both_splits_differ(math: Math) -> None:
    assert validate(math, "math", seed=0, most=100) > 70
    trained, held_out = (
        {task.row["messages"][0]["content"] for task in math.tasks(split, 1)} for split in ("train", "eval")
    )
    assert len(trained) + len(held_out) == 90
    assert held_out
    assert not trained & held_out
    assert [task.name for task in math.tasks("train", 1)] != [task.name for task in math.tasks("train", 2)]


def test_an_answer_outside_of_the_final_message_earns_nothing(math: Math) -> None:
    task = next(iter(math.tasks("train", 0)))
    right, _ = math.examples(task)
    assert math.open(task, 0).step(right).reward == 1.0
    assert math.open(task, 0).step(Turn(right.messages, None)).reward == 0.0


def test_what_we_call_right_math_verify_does_too() -> None:
    """But for what it doesn't read: words, lists in words, units."""
    verifier = pytest.importorskip("math_verify")
    disagree = []
    for gold, answer in RIGHT:
        if decide(gold, answer, ASKED) is not True:
            continue
        read = [verifier.parse(f"${text.strip('$')}$", parsing_timeout=None) for text in (gold, answer)]
        if not verifier.verify(*read, timeout_seconds=None):
            disagree.append((gold, answer))
    assert len(disagree) <= 0.2 * len(RIGHT), disagree


@pytest.mark.parametrize(
    ("row", "options", "kind", "words"),
    [
        ({"question": "2?", "answer": 2}, {"answer": "solution"}, RecipeError, "a column that .*rows.jsonl:1 lacks"),
        ({"question": 3, "answer": 2}, {}, DataError, "rows.jsonl:1: `question` is no text"),
        ({"question": "2?", "answer": [2]}, {}, DataError, "`answer` is neither text nor a number"),
        ({"question": "2?", "answer": " "}, {}, DataError, "`answer` holds no answer"),
    ],
)
def test_rows_that_can_not_be_used_are_told(
    tmp_path: Path, jails: Jails, row: dict, options: dict, kind: type[Exception], words: str
) -> None:
    pytest.importorskip("math_verify")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(kind, match=words):
        make_env("math", {"data": str(tmp_path / "rows.jsonl"), **options}, jails)


def test_the_order_of_tasks_is_the_seeds(math: Math) -> None:
    names = [[task.name for task in islice(math.tasks("train", 5), 20)] for _ in range(2)]
    assert names[0] == names[1]
