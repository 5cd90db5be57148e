"""Environments of other packages as ours, with the real packages, and ours in TRL."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from ossia.errors import RecipeError, RewardError
from ossia.harmony import Message
from ossia.rl.adapters.trl import as_reward_func, rows_of
from ossia.rl.env import Step, Turn, final
from ossia.rl.envs import make_env
from ossia.rl.jail import Jails
from tests.rl.rewards import Talking

GUESS = '''
import string
import gymnasium
from gymnasium.envs.registration import register


class Guess(gymnasium.Env):
    """Guess a digit: told whether it is higher or lower."""

    observation_space = gymnasium.spaces.Text(64, charset=string.printable)
    action_space = gymnasium.spaces.Text(1, min_length=1, charset="0123456789")

    def __init__(self, most=9):
        self._most = most

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._digit = int(self.np_random.integers(self._most + 1))
        return "Guess a digit", {}

    def step(self, action):
        off = self._digit - int(action)
        return "higher" if off > 0 else "lower", float(off == 0), off == 0, False, {"off": off, "why": "text"}


class Numbers(Guess):
    action_space = gymnasium.spaces.Discrete(10)


register("Guess-v0", entry_point=Guess, max_episode_steps=3)
register("Numbers-v0", entry_point=Numbers)
'''


pytestmark = [pytest.mark.filterwarnings("ignore:.*already in registry"), pytest.mark.filterwarnings("ignore:connect")]


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def played(env: object, number: int, answers: list[str]) -> list[Step]:
    task = next(islice(env.tasks("train", 0), number, None))  # type: ignore[attr-defined]
    episode = env.open(task, 0)  # type: ignore[attr-defined]
    steps = []
    for answer in answers:
        steps.append(episode.step(final(answer)))
        if steps[-1].terminated or steps[-1].truncated:
            break
    episode.close()
    return steps


def test_a_gymnasium_environment_in_text_is_played(on_path: Path) -> None:
    pytest.importorskip("gymnasium")
    (on_path / "guess_game.py").write_text(GUESS)
    env = make_env("gymnasium:guess_game:Guess-v0", {"most": 9, "instruction": "One digit."}, Jails())
    task = next(env.tasks("train", 0))
    assert task.row == {"messages": [{"role": "user", "content": "Guess a digit"}], "developer": "One digit."}
    steps = played(env, 0, [str(n) for n in range(10)])
    assert [step.messages for step in steps[:-1]] == [(Message("user", "higher"),)] * (len(steps) - 1)
    assert steps[-1].terminated or steps[-1].truncated
    assert set(steps[0].metrics) == {"off", "well_formed"}
    digit = round(steps[0].metrics["off"])  # the first guess is 0
    assert played(env, 0, [str(digit)])[0].reward == 1.0
    assert played(env, 0, ["twelve"]) == [Step(metrics={"well_formed": 0.0})]
    cut = env.open(task, 0)
    assert cut.step(Turn((), None)).reward == 0.0
    assert {t.name for t in islice(env.tasks("train", 0), 50)}.isdisjoint(
        {t.name for t in islice(env.tasks("eval", 0), 50)}
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gymnasium:guess_game2:Numbers-v0", {}, r"its action_space is Discrete\(10\); expected: Text"),
        ("gymnasium:NoSuch-v0", {}, "NoSuch-v0.*can't be made"),
        ("gymnasium:guess_game2:Guess-v0", {"least": 3}, "unexpected keyword argument 'least'"),
    ],
)
def test_a_gymnasium_environment_that_can_not_be_talked_to_is_told(
    on_path: Path, name: str, options: dict, words: str
) -> None:
    pytest.importorskip("gymnasium")
    (on_path / "guess_game2.py").write_text(GUESS)
    with pytest.raises(RecipeError, match=words):
        make_env(name, options, Jails())


def test_an_environment_that_forgets_its_seed_costs_the_sample(on_path: Path) -> None:
    pytest.importorskip("gymnasium")
    forgetful = GUESS.replace('return "Guess a digit", {}', "import time; return str(time.time_ns()), {}")
    (on_path / "forgetful.py").write_text(forgetful)
    env = make_env("gymnasium:forgetful:Guess-v0", {}, Jails())
    with pytest.raises(RewardError, match="begins otherwise than before with the same seed"):
        played(env, 0, ["1"])


ADDING = """
import verifiers as vf
from datasets import Dataset


async def exact(completion, answer, state):
    return float(completion[-1]["content"].strip() == answer)


def short(completion, **kwargs):
    return float(len(completion[-1]["content"]) < 4)


def rows(numbers):
    return Dataset.from_list([{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in numbers])


def load_environment(most=20, group=False):
    rubric = vf.Rubric(funcs=[exact, short], weights=[1.0, 0.5])
    if group:
        rubric.add_reward_func(lambda completions: [0.0 for _ in completions])
    return vf.SingleTurnEnv(
        dataset=rows(range(most)), eval_dataset=rows(range(15, most + 5)), system_prompt="Add.", rubric=rubric
    )
"""
TOOLS = '''
import verifiers as vf
from datasets import Dataset


def double(number: int) -> str:
    """Twice a number.

    Args:
        number: which
    """
    return str(2 * number)


async def exact(completion, answer):
    return float(completion[-1]["content"] == answer)


def load_environment():
    data = Dataset.from_list([{"question": f"Double {n}", "answer": str(2 * n)} for n in range(8)])
    return vf.ToolEnv(tools=[double], dataset=data, rubric=vf.Rubric(funcs=[exact]), max_turns=4)
'''


def test_an_environment_of_verifiers_is_scored_by_its_rubric(on_path: Path) -> None:
    pytest.importorskip("verifiers", reason="pip install 'ossia[verifiers]'")
    (on_path / "adding_env.py").write_text(ADDING)
    env = make_env("verifiers:adding-env", {"most": 20}, Jails())
    tasks = list(env.tasks("train", 0))
    assert len(tasks) == 15  # the five that are evaluated too are left out
    assert tasks[0].row["messages"][0] == {"role": "system", "content": "Add."}
    answer = tasks[0].info["row"]["answer"]
    step = env.open(tasks[0], 0).step(final(answer, thinking="So."))
    assert step == Step(reward=1.5, metrics=step.metrics)
    assert {"exact": 1.0, "short": 1.0}.items() <= dict(step.metrics).items()
    assert env.open(tasks[0], 0).step(final("wrong one")).reward == 0.0
    assert (
        env.open(tasks[0], 0).step(Turn((Message("assistant", answer, channel="analysis"),), None)).metrics["exact"]
        == 0
    )
    trained, held_out = ({t.row["messages"][-1]["content"] for t in env.tasks(split, 0)} for split in ("train", "eval"))
    assert held_out
    assert not trained & held_out


def test_a_tool_of_an_environment_of_verifiers_is_called(on_path: Path) -> None:
    pytest.importorskip("verifiers", reason="pip install 'ossia[verifiers]'")
    (on_path / "doubling_env.py").write_text(TOOLS)
    env = make_env("verifiers:doubling-env", {}, Jails())
    task = next(env.tasks("train", 0))
    assert task.row["tools"][0]["function"]["name"] == "double"
    answer = task.info["row"]["answer"]
    episode = env.open(task, 0)
    arguments = f'{{"number": {int(answer) // 2}}}'
    call = Message("assistant", arguments, channel="commentary", recipient="functions.double")
    step = episode.step(Turn((call,), "<|call|>"))
    result = Message("tool", answer, channel="commentary", recipient="assistant", name="functions.double")
    assert step == Step((result,), terminated=False)
    assert episode.step(final(answer)).reward == 1.0
    episode.close()


def test_an_environment_of_verifiers_that_can_not_be_used_is_told(on_path: Path) -> None:
    pytest.importorskip("verifiers", reason="pip install 'ossia[verifiers]'")
    (on_path / "adding_too.py").write_text(ADDING)
    with pytest.raises(RecipeError, match="its rubric scores groups"):
        make_env("verifiers:adding-too", {"group": True}, Jails())
    with pytest.raises(RecipeError, match="Could not import 'no-such-env'"):
        make_env("verifiers:no-such-env", {}, Jails())


SERVER = """
import random, sys
import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    message: str


class Heard(Observation):
    heard: str
    length: int = 0


class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State(step_count=0)

    def reset(self, seed=None, episode_id=None, **kwargs):
        self._word = random.Random(seed).choice(["oak", "elm", "ash"])
        return Heard(heard=f"Say {self._word}", done=False, reward=0.0)

    def step(self, action, **kwargs):
        right = action.message == self._word
        return Heard(heard=action.message, length=len(action.message), done=right, reward=float(right))

    @property
    def state(self):
        return self._state


app = create_app(Echo, Say, Heard, env_name="echo", max_concurrent_envs=8)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[str]:
    """The address of an OpenEnv server of one's own."""
    pytest.importorskip("openenv", reason="pip install 'ossia[openenv]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "server.py").write_text(SERVER)
    server = subprocess.Popen(
        [sys.executable, str(tmp_path / "server.py"), str(port)], stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, server.stderr and server.stderr.read()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.communicate()


def test_an_openenv_server_is_played(echo: str) -> None:
    options = {"action": "message", "observation": "heard"}
    env = make_env(f"openenv:{echo}", options, Jails())
    task = next(env.tasks("train", 0))
    word = task.info["text"].removeprefix("Say ")
    assert word in ("oak", "elm", "ash")
    episode = env.open(task, 0)
    missed = episode.step(final("fir"))
    assert missed == Step((Message("user", "fir"),), 0.0, False, metrics={"length": 3.0, "well_formed": 1.0})
    hit = episode.step(final(word))
    assert (hit.reward, hit.terminated, hit.messages) == (1.0, True, ())
    episode.close()
    many = [env.open(t, 0) for t in islice(env.tasks("train", 1), 20)]  # more than the server has sessions
    assert all(one.step(Turn((), None)).reward == 0.0 for one in many)
    with pytest.raises(RecipeError, match="`observation` is 'seen', which the server's observations lack"):
        make_env(f"openenv:{echo}", {**options, "observation": "seen"}, Jails())


def test_an_openenv_server_that_is_not_there_is_told() -> None:
    pytest.importorskip("openenv", reason="pip install 'ossia[openenv]'")
    with pytest.raises(RecipeError, match="start the server, or mend the address"):
        make_env("openenv:http://127.0.0.1:9", {"action": "message", "observation": "heard"}, Jails())


def test_an_option_that_an_adapter_lacks_is_told() -> None:
    with pytest.raises(RecipeError, match=r"env openenv:http://x: .*actoin.*\n  allowed: action, observation"):
        make_env("openenv:http://x", {"action": "a", "observation": "heard", "actoin": "b"}, Jails())


def test_trl_judges_completions_by_an_environment_of_ours() -> None:
    env = make_env("sort", {"n": 3}, Jails())
    tasks = list(islice(env.tasks("train", 0), 4))
    rows, reward = rows_of(tasks), as_reward_func(env, tasks)
    assert rows[1] == {"prompt": tasks[1].row["messages"], "task": 1}
    assert reward.__name__ == "Sort"
    right = [task.info["answer"] for task in tasks]
    said = [[{"role": "assistant", "content": text}] for text in (*right[:3], "no")]
    prompts = [row["prompt"] for row in rows]
    assert reward(prompts=prompts, completions=said, task=[0, 1, 2, 3], trainer_state=None) == [1.0, 1.0, 1.0, 0.0]
    assert reward(completions=right, task=[0, 2, 1, 3]) == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(RewardError, match="takes several turns"):
        as_reward_func(Talking(), list(islice(Talking().tasks("train", 0), 1)))(completions=["x"], task=[0])
