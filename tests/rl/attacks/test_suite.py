"""The corpus against every kind of environment that ships: nothing earned, nothing touched, honest answers unharmed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ossia.rl.attacks import Report, as_text, attack, read_attacks
from ossia.rl.jail import probe_level


def through(env: str, *kinds: str, **options: Any) -> Report:
    """The report of attacks of some classes, or all; it fails here if one got through or was left out."""
    report = attack(env, options, only=lambda one: not kinds or one.kind in kinds)
    assert report.held, as_text(report)
    assert all(result.run or "EXPRESSION" in result.attack.code for result in report.results), as_text(report)
    return report


def test_there_are_attacks_of_every_class_each_said_in_a_sentence() -> None:
    attacks = read_attacks()
    kinds = [one.kind for one in attacks]
    assert len(attacks) >= 120
    least = {
        "lying": 14,
        "reach": 16,
        "forge": 12,
        "time": 11,
        "resources": 15,
        "system": 17,
        "state": 5,
        "game2048": 5,
        "matmul": 8,
        "kernel": 20,
        "verifier": 8,
        "tool": 5,
    }
    assert {kind: kinds.count(kind) for kind in least if kinds.count(kind) < least[kind]} == {}
    assert set(kinds) == set(least)
    assert len({(one.interface, one.code) for one in attacks}) == len(attacks)
    assert [one.name for one in attacks if not one.tries.endswith(".") or len(one.tries) > 118] == []


def test_no_program_earns_or_touches_anything_where_functions_are_asked_for() -> None:
    report = through("squares", seconds=0.2)
    assert len(report.results) >= 120
    assert (report.honest, report.failure, report.levels) == (1.0, 0.0, ("compute",))


def test_no_strategy_wins_a_game_that_it_does_not_play() -> None:
    assert len(through("game2048", "game2048", size=3, games=1, seconds=0.3).results) >= 8


def test_no_product_is_paid_that_is_wrong_nor_any_clock_that_is_stopped() -> None:
    assert len(through("matmul", "matmul", rounds=3).results) >= 8


def test_no_cell_of_the_python_tool_reaches_the_answer() -> None:
    assert len(through("tool_python", "tool", "forge", seconds=0.2).results) >= 20


def test_no_text_persuades_a_check_of_math(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = [
        {"question": "What is $5!$?", "answer": "120"},
        {"question": "What is $\\sum_{i=1}^{100} i$?", "answer": "5050"},
        {"question": "What is $(x+1)^2$, expanded?", "answer": "x^2+2x+1"},
        {"question": "Compute $\\gcd(12, 18) + 0$.", "answer": "6"},
        {"question": "What is $\\int_0^1 2x \\, dx$?", "answer": "1"},
        {"question": "What is $\\binom{8}{4}$?", "answer": "70"},
        {"question": "What is $3^4 - 1$?", "answer": "80"},
        {"question": "Solve $x^2 = 4$ for all $x$.", "answer": "\\{-2, 2\\}"},
    ]
    for half in (rows[:4], rows[4:]):  # attacks go round four tasks
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
        assert len(through("math", data=str(tmp_path / "rows.jsonl")).results) >= 25


def test_no_text_persuades_a_check_of_exact_answers() -> None:
    report = through("sort", "verifier")
    assert report.levels == ()
    assert all(result.seconds < 1 for result in report.results)


def test_no_text_persuades_a_scorer_of_the_package() -> None:
    pytest.importorskip("reasoning_gym")
    report = through("reasoning_gym", "verifier", task="chain_sum")
    assert report.levels == ("compute",)
    assert len(report.results) >= 20


def test_no_kernel_in_c_gets_out_of_its_compiler_or_its_process() -> None:
    if reason := probe_level("tools"):
        pytest.skip(reason)
    report = through("kernel_c", rounds=3)
    assert len(report.results) >= 20
    assert report.levels == ("tools",)
