"""Questions with the `python` tool: turns, what the tool says, and whole episodes through the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from ossia import grpo
from ossia.config import HarmonyConfig, Recipe, load_recipe
from ossia.engine import Engine, Request, Session
from ossia.engine.request import Token
from ossia.errors import RecipeError
from ossia.harmony import Message, Renderer
from ossia.harmony.vocab import Vocabulary
from ossia.model.open import open_model
from ossia.rl.batch import make_batch, rule_of, score_group
from ossia.rl.env import Task, Turn, final, validate
from ossia.rl.envs import make_env
from ossia.rl.envs.tool_python import ToolEpisode, ToolPython, call, code_called
from ossia.rl.jail import Jails
from ossia.rl.judge import Judge
from ossia.rl.rollout import Limits, Rollout, Trajectory
from ossia.rl.sampler import EngineSampler
from ossia.rl.tasks import NamedEnv, TaskStream


@pytest.fixture(scope="module")
def jails() -> Iterator[Jails]:
    with Jails() as made:
        yield made


@pytest.fixture
def env(jails: Jails) -> ToolPython:
    return ToolPython(jails, seconds=0.2)


def first(env: ToolPython) -> Task:
    return next(env.tasks("train", 0))


@pytest.fixture
def episode(env: ToolPython) -> Iterator[ToolEpisode]:
    with closing(env.open(first(env), 0)) as opened:
        yield opened


def said(episode: ToolEpisode, code: str) -> str:
    (message,) = episode.step(call(code)).messages
    return message.content


def test_each_tasks_own_program_prints_its_answer_and_the_answer_earns_everything(env: ToolPython) -> None:
    for digits in (2, 12):
        for task in islice(replace(env, digits=digits).tasks("train", digits), 60):
            with closing(env.open(task, 0)) as episode:
                step = episode.step(call(task.info["code"]))
                assert (step.terminated, step.reward) == (False, 0.0)
                (result,) = step.messages
                assert result.content == task.info["answer"]
                done = episode.step(final(result.content))
                assert (done.terminated, done.reward, done.metrics["answered"]) == (True, 1.0, 1.0)
    assert validate(env, "tool_python", seed=0, most=20) == 20


def test_one_kind_of_question_can_be_asked_alone(env: ToolPython) -> None:
    names = [task.name for task in islice(replace(env, kind="product", digits=2).tasks("train", 0), 50)]
    assert all(re.fullmatch(r"What is \d\d \* \d\d\?", name) for name in names)
    assert len({task.name[:9] for task in islice(env.tasks("train", 0), 50)}) > 4


def test_a_result_is_the_tools_own_message_in_the_channel_of_the_call(episode: ToolEpisode) -> None:
    (result,) = episode.step(call("1 + 1")).messages
    assert result == Message("tool", "2", channel="analysis", recipient="assistant", name="python")
    aloud = Message("assistant", "1 + 1", channel="commentary", recipient="python")
    (result,) = episode.step(Turn((aloud,), "<|call|>")).messages
    assert result.channel == "commentary"


def test_variables_stay_until_the_session_ends_and_its_end_is_told_twice(episode: ToolEpisode) -> None:
    assert said(episode, "x = 20\nprint('hi')") == "hi"
    assert said(episode, "x + 1") == "21"
    assert said(episode, "x = 3") == "[no output]"
    assert said(episode, "print('so far'); y") == "so far\nline 1: NameError: name 'y' is not defined"
    stopped = episode.step(call("print('lost')\nwhile True: pass"))
    assert stopped.messages[0].content.startswith("The code was stopped: it took too long. All variables are gone")
    assert (stopped.metrics["tool_timeouts"], stopped.metrics["tool_errors"], stopped.terminated) == (1.0, 1.0, False)
    after = said(episode, "x")
    assert after.startswith("[A new session: in the one before, it took too long, and its variables are gone.]\n")
    assert "NameError" in after
    assert said(episode, "2 + 2") == "4"


def test_what_is_printed_is_shown_up_to_a_length(jails: Jails) -> None:
    with closing(ToolPython(jails, output=100).open(first(ToolPython(jails)), 0)) as episode:
        assert said(episode, "print('é' * 250)") == "é" * 100 + "\n[151 more characters]"
        assert len(said(episode, "raise ValueError('x' * 5000)")) < 140


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "__import__('subprocess').run('id')",
        "__import__('os').fork()",
        "__import__('socket').socket()",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('os')._exit(0)",
        "__import__('os').write(3, b'\\0\\0\\0\\4true')",
        "__import__('os').close(3)",
        "x = bytearray(1 << 33)",
        "print('\\ud800')",
        "import sys; sys.exit(0)",
    ],
)
def test_what_code_tries_is_an_error_of_that_call_and_the_tool_goes_on(episode: ToolEpisode, code: str) -> None:
    step = episode.step(call(code))
    assert (step.reward, step.terminated, step.metrics["tool_errors"]) == (0.0, False, 1.0)
    assert said(episode, "6 * 7").endswith("42")


def test_no_call_earns_anything_whatever_it_prints(env: ToolPython) -> None:
    task = first(env)
    with closing(env.open(task, 0)) as episode:
        for code in ("print('{\"reward\": 1.0}')", task.info["answer"], f"print({task.info['answer']})"):
            assert episode.step(call(code)).reward == 0.0
        assert episode.step(final("I don't know.")).reward == 0.0


def test_only_one_well_formed_call_that_ends_its_turn_is_run(episode: ToolEpisode) -> None:
    asked = call("1").messages[0]
    for turn in (
        Turn((asked,), "<|return|>"),
        Turn((asked,), None),
        Turn((asked,), "<|call|>", ("a special token inside a message",)),
        Turn((asked, asked), "<|call|>"),
        Turn((Message("assistant", "5", channel="final"), asked), "<|call|>"),
        Turn((replace(asked, recipient="functions.python"),), "<|call|>"),
        Turn((replace(asked, channel="final"),), "<|call|>"),
        Turn((), "<|call|>"),
    ):
        assert code_called(turn) is None
        step = episode.step(turn)
        assert (step.terminated, step.reward, step.messages) == (True, 0.0, ())
    assert code_called(call("1", thinking="So.")) == "1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"digits": 1}, "`digits` is 1; allowed: 2 to 12"),
        ({"seconds": 0}, "`seconds` is 0; allowed: 0.1 to 30"),
        ({"output": 5}, "`output` is 5; allowed: 100 to 20000"),
        ({"kind": "sums"}, "`kind` is 'sums'; allowed: all, product, power"),
        ({"digits": "5"}, "`digits` is '5'; expected: int"),
    ],
)
def test_an_option_out_of_its_range_is_told(jails: Jails, options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_env("tool_python", options, jails)


class Forced:
    """A constraint under which nothing but the given ids can be sampled."""

    def __init__(self, ids: Sequence[int], num_ids: int) -> None:
        self._left, self._num_ids = list(ids), num_ids

    def mask(self) -> torch.Tensor:
        allowed = torch.zeros(self._num_ids, dtype=torch.bool)
        allowed[self._left[0]] = True
        return allowed

    def push(self, token: int) -> None:
        assert self._left.pop(0) == token

    def copy(self) -> Forced:
        return Forced(self._left, self._num_ids)


class Scripted:
    """A session whose requests sample what `say` makes of their prompts, through the real engine."""

    def __init__(self, session: Session, num_ids: int, say: Callable[[Sequence[int]], Sequence[int]]) -> None:
        self._session, self._num_ids, self._say = session, num_ids, say

    @property
    def idle(self) -> bool:
        return self._session.idle

    def add(self, request: Request) -> int:
        return self._session.add(replace(request, constraint=Forced(self._say(request.ids), self._num_ids)))

    def step(self) -> list[Token]:
        return self._session.step()


def ids_of(vocab: Vocabulary, turn: Turn) -> list[int]:
    """What a policy samples that says this turn."""
    prompt = Renderer(vocab).continuation(())
    ids = Renderer(vocab).continuation(turn.messages)[len(prompt) : -len(prompt)]
    return [*ids[:-1], vocab.special[turn.stop or ""]]


RecipeOf = Callable[..., Recipe]


@pytest.fixture
def scripted(recipe_of: RecipeOf, env: ToolPython) -> tuple[Vocabulary, list[list[Trajectory]], Recipe]:
    """Two tasks in groups of two: the right program and what it printed, but every second answer a digit too long."""
    recipe = recipe_of()
    model, vocab = open_model(recipe.model, dtype=recipe.dtype, weights="auto", device="cpu")
    tasks = TaskStream([NamedEnv("tool_python", env, 1.0)], "train", 0, Renderer(vocab), HarmonyConfig(), 4000)
    asked, number = tasks.take(2), iter(range(100))

    def say(prompt: Sequence[int]) -> list[int]:
        text = vocab.decode(list(prompt))
        (one,) = (one for one in asked if text.startswith(vocab.decode(list(one.ids))))
        _, result, rest = text.partition("<|start|>python to=assistant<|channel|>analysis<|message|>")
        if not result:
            return ids_of(vocab, call(one.task.info["code"], thinking="Python can."))
        printed = rest.removesuffix("<|end|><|start|>assistant")
        return ids_of(vocab, final(printed + "0" * (next(number) % 2)))

    session = Scripted(Engine(model, vocab=vocab, max_batch=4).session(), model.arch.vocab_size, say)
    judge = Judge(2, 30.0)
    rollout = Rollout(EngineSampler(session), vocab, judge, Limits(400, 4, 4096), routes=True)
    groups = rollout.sample(asked, 2, version=0, seed_of=lambda t: t.sample)
    judge.close()
    return vocab, groups, recipe


def test_an_episode_goes_through_the_engine_and_the_jail_and_only_what_was_sampled_is_trained(scripted) -> None:
    vocab, groups, recipe = scripted
    for group in groups:
        assert [t.reward for t in group] == [1.0, 0.0]
        for t in group:
            assert (t.turns, t.finish, t.problems, t.metrics["calls"]) == (2, "terminated", 0, 1.0)
            answer, code = (t.asked.task.info[name] for name in ("answer", "code"))
            theirs = vocab.decode([i for i, mine in zip(t.ids, t.sampled, strict=True) if not mine])
            result = f"<|start|>python to=assistant<|channel|>analysis<|message|>{answer}<|end|><|start|>assistant"
            assert theirs.endswith(result)
            assert "# Tools\n\n## python\n" in theirs
            mine = vocab.decode(t.sampled_ids())
            turns = "<|channel|>analysis<|message|>Python can.<|end|><|start|>assistant to=python"
            assert mine.startswith(f"{turns}<|channel|>analysis code<|message|>{code}<|call|><|channel|>final")
            assert mine.endswith("<|return|>")
            assert [m.role for m in t.messages] == ["assistant", "assistant", "tool", "assistant"]
            assert len(t.routes) == len(t.ids)
    rl = recipe.rl.model_copy(update={"mask_truncated": False})
    batch = make_batch([score_group(group, rl, rule_of(rl)) for group in groups], rl, rule_of(rl), 8192)
    trained = sum(int((pack.weights > 0).sum()) for pack in batch.packs)
    assert trained == sum(t.num_sampled for group in groups for t in group)
    assert np.isfinite([logprob for group in groups for t in group for logprob in t.logprobs]).all()


def test_a_recipe_with_the_tool_trains_from_end_to_end(rewarded, tmp_path) -> None:
    file = rewarded(tmp_path / "run", steps=1)
    text = file.read_text()
    env = next(line for line in text.splitlines() if line.startswith("env:"))
    for old, new in (
        (env, "env: {id: tool_python, options: {digits: 2}}"),
        ("max_length: 256", "max_length: 3000"),
        ("tokens_per_step: 512, tokens_per_pack: 256", "tokens_per_step: 4096, tokens_per_pack: 4096"),
    ):
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    result = grpo.run(load_recipe(file))
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert [one["split"] for one in samples].count("train") == 3 * 4
    assert all(one["failure"] is None and one["parts"]["calls"] == 0.0 for one in samples)
