"""Judging on threads: errors and time-outs cost one sample."""

from __future__ import annotations

import json
import sys
import threading

import numpy as np

from ossia.rl.env import OneStep, Step, Turn
from ossia.rl.judge import Judge

TURN = Turn((), "<|return|>")


def reward(value: float) -> OneStep:
    return OneStep(lambda turn: (value, {}))


def fail(turn: Turn) -> tuple[float, dict[str, float]]:
    raise ValueError("no such answer")


def test_what_an_environment_raises_is_a_failure_of_that_sample() -> None:
    judge = Judge(1, 10.0)
    bad, good = judge.submit(OneStep(fail), TURN), judge.submit(reward(0.5), TURN)
    failure = judge.wait(bad).failure or ""
    assert failure.startswith("ValueError: no such answer (test_judge.py:")  # its own line
    step = judge.wait(good).step
    assert step is not None
    assert step.reward == 0.5
    judge.close()


def test_a_reward_that_is_not_finite_is_a_failure() -> None:
    judge = Judge(1, 10.0)
    verdict = judge.wait(judge.submit(reward(float("nan")), TURN))
    assert verdict.step is None
    assert verdict.failure == "ValueError: reward of a step: not finite"
    judge.close()


def test_one_that_hangs_is_left_behind_and_the_next_ones_are_judged() -> None:
    release = threading.Event()

    def hang(turn: Turn) -> tuple[float, dict[str, float]]:
        release.wait(30)
        return 1.0, {}

    judge = Judge(1, 0.2)
    first, second = judge.submit(OneStep(hang), TURN), judge.submit(reward(2.0), TURN)
    assert judge.wait(first).failure == "no verdict after 0.2 s"
    step = judge.wait(second).step
    assert step is not None
    assert step.reward == 2.0
    release.set()
    judge.close()
    assert first.step is None  # what came too late counts for nothing


def test_one_is_not_waited_for_for_ever_behind_others_that_hang() -> None:
    release = threading.Event()

    def hang(turn: Turn) -> tuple[float, dict[str, float]]:
        release.wait(30)
        return 1.0, {}

    judge = Judge(2, 0.2)
    hanging = [judge.submit(OneStep(hang), TURN) for _ in range(4)]
    last = judge.submit(reward(2.0), TURN)
    waiting = threading.Thread(target=judge.wait, args=(last,), daemon=True)
    waiting.start()  # for the last alone: nobody else looks at those before it
    waiting.join(10)
    assert last.step is not None
    assert last.step.reward == 2.0
    assert [judge.wait(one).failure for one in hanging] == ["no verdict after 0.2 s"] * 4
    release.set()
    judge.close()


def test_a_reward_that_ends_its_program_or_returns_no_step_is_a_failure() -> None:
    class Number:
        def step(self, turn: Turn) -> float:
            return 1.0

        def close(self) -> None:
            pass

    def leave(turn: Turn) -> tuple[float, dict[str, float]]:
        sys.exit(3)

    judge = Judge(1, 10.0)
    left = judge.wait(judge.submit(OneStep(leave), TURN))
    assert (left.failure or "").startswith("SystemExit: 3")
    number = judge.wait(judge.submit(Number(), TURN))  # type: ignore[arg-type]
    assert number.failure == "the environment returned float, not a Step"
    judge.close()


def test_numbers_of_a_step_are_plain_ones() -> None:
    step = Step(reward=np.float32(0.5), metrics={"a": np.float32(1.5), "b": np.int64(2)})
    assert json.dumps([step.reward, step.metrics]) == '[0.5, {"a": 1.5, "b": 2.0}]'


def test_turns_are_judged_at_once() -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(turn: Turn) -> tuple[float, dict[str, float]]:
        both.wait()
        return 1.0, {}

    judge = Judge(2, 20.0)
    verdicts = [judge.submit(OneStep(meet), TURN) for _ in range(2)]
    assert [judge.wait(verdict).failure for verdict in verdicts] == [None, None]
    judge.close()
