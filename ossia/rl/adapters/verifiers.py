"""Environments in the form of the package verifiers, `load_environment()` and a Rubric: `verifiers:ENV_ID`.

Theirs drives a rollout by itself and asks a client for each turn; ours is told each turn. So the rollout's parts are
called one by one, in the order of their `MultiTurnEnv.rollout`: set up, add the turn, ask whether it is over, take what
the environment says, and at the end let the rubric score. Their coroutines run on one loop of the environment's own.
Source: verifiers 0.3.1, whose environments are those of `verifiers.legacy`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ossia.errors import MissingExtraError, RecipeError, RewardError
from ossia.harmony.messages import Message
from ossia.rl.env import Episode, Split, Step, Task, Turn, final

T = TypeVar("T")
_TOOLS = "functions."
_HELD_OUT = 10  # one prompt of so many, where theirs holds out none


class Verifiers:
    """One environment of theirs. Its evaluation rows, if any, are the held-out ones."""

    def __init__(self, name: str, env: Any, api: Any) -> None:
        self._name, self._env, self.api = name, env, api
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=f"verifiers {name}", daemon=True).start()

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The rows in the seed's order, without the prompts of the other split.

        Where the environment has no rows for evaluation, a tenth of its prompts is held out.
        """
        apart = self._env.eval_dataset is not None or self._env.eval_dataset_source is not None
        rows = self._env.get_eval_dataset(seed=seed) if apart and split == "eval" else self._env.get_dataset(seed=seed)
        evaluated = {_key(row) for row in self._env.get_eval_dataset()} if apart and split == "train" else set()
        for row in rows:
            held_out = zlib.crc32(_key(row)) % _HELD_OUT == 0
            if _key(row) in evaluated or (not apart and held_out != (split == "eval")):
                continue
            messages = [{"role": one["role"], "content": one["content"]} for one in row["prompt"]]
            asked: dict[str, Any] = {"messages": messages}
            if self._env.tool_defs:
                asked["tools"] = [{"type": "function", "function": _tool(one)} for one in self._env.tool_defs]
            yield Task(asked, {"row": row}, f"{split} {row['example_id']}")

    def open(self, task: Task, seed: int) -> Episode:
        """See Env."""
        return _Episode(self, self._env, task)

    def examples(self, task: Task) -> tuple[Turn, Sequence[Turn]]:
        """Nobody but the rubric knows which form of the answer is right: nothing to try."""
        return final(""), ()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine of theirs returns, from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Episode:
    def __init__(self, owner: Verifiers, env: Any, task: Task) -> None:
        self._owner, self._env, self._api = owner, env, owner.api
        self._row = task.info["row"]
        self._state: Any = None
        self._prompt: list[Any] = []

    def step(self, turn: Turn) -> Step:
        """One turn of their rollout. Their reward comes with the last one."""
        return self._owner.run(self._step(turn))

    def close(self) -> None:
        """See Episode. Their own cleaning up was done with the last turn, or is done now."""
        if self._state is not None:
            self._owner.run(self._env.cleanup(self._state))
            self._state = None

    async def _step(self, turn: Turn) -> Step:
        if self._state is None:
            state = await self._env.init_state(self._row, self._api.client, "ossia", {})
            self._state = await self._env.setup_state(state) or state
            self._prompt = list(await self._env.get_prompt_messages(self._state))
        state, said = self._state, self._said(turn)
        add = self._api.TrajectoryStep(
            prompt=self._prompt,
            completion=[said],
            response=None,
            tokens=None,
            reward=None,
            advantage=None,
            is_truncated=turn.stop is None,
            trajectory_id=state["trajectory_id"],
            extras={},
        )
        await self._env.add_trajectory_step(state, add)
        if not await self._env.is_completed(state):
            known = len(self._prompt) + 1
            self._prompt = list(await self._env.get_prompt_messages(state))
            if state.get("final_env_response") is None:
                names = {call.id: call.name for call in said.tool_calls or ()}
                return Step(tuple(_message(one, names) for one in self._prompt[known:]), terminated=False)
            await self._env.is_completed(state)
        return await self._scored(state)

    async def _scored(self, state: Any) -> Step:
        """The end: what the rubric makes of it."""
        await self._env.cleanup(state)
        await self._env.rubric.score_rollout(state)
        await self._env.rubric.cleanup(state)
        self._state = None
        metrics = {name: float(value) for name, value in (state["metrics"] or {}).items()}
        return Step((), float(state["reward"]), True, bool(state["is_truncated"]), metrics)

    def _said(self, turn: Turn) -> Any:
        """A turn as they have it: the thinking, the answer, the calls."""
        thinking = "\n".join(one.content for one in turn.messages if one.channel == "analysis" and not one.recipient)
        text = turn.answer() or ""
        calls = [
            self._api.ToolCall(
                id=f"call_{number}", name=(one.recipient or "").removeprefix(_TOOLS), arguments=one.content
            )
            for number, one in enumerate(turn.calls())
        ]
        return self._api.AssistantMessage(content=text, reasoning_content=thinking or None, tool_calls=calls or None)


def _key(row: Mapping[str, Any]) -> bytes:
    """A row's prompt, for comparing."""
    return json.dumps(row["prompt"], default=str).encode()


def _tool(tool: Any) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _message(message: Any, names: Mapping[str, str]) -> Message:
    """What their environment said as ours."""
    text = message.content if isinstance(message.content, str) else json.dumps(message.content, default=str)
    if message.role == "tool":
        name = _TOOLS + names.get(message.tool_call_id, "tool")
        return Message("tool", text, channel="commentary", recipient="assistant", name=name)
    if message.role not in ("user", "system"):
        raise RewardError(f"verifiers: an environment's message of role {message.role!r}; expected: user, system, tool")
    return Message(message.role, text)


class _Api:
    """What is used of the package's types, and the client that is never asked."""

    def __init__(self) -> None:
        from verifiers.legacy.clients import Client
        from verifiers.legacy.types import AssistantMessage, ToolCall, TrajectoryStep

        self.AssistantMessage, self.ToolCall, self.TrajectoryStep = AssistantMessage, ToolCall, TrajectoryStep
        silent = dict.fromkeys(Client.__abstractmethods__)
        self.client = type("NoClient", (Client,), silent)(None)


def load(name: str, **options: Any) -> Verifiers:
    """An environment by its id: an installed package, or a module on the path, with `load_environment`.

    options  for its `load_environment`
    Raises   MissingExtraError; RecipeError where it can't be loaded, has no rows, or scores whole groups
    """
    try:
        from verifiers.legacy.utils.env_utils import load_environment
    except ImportError as error:
        raise MissingExtraError(f"env verifiers:{name}: needs verifiers: pip install 'ossia[verifiers]'") from error
    try:
        env = load_environment(name, **options)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"env verifiers:{name}: {error}") from error
    if env.rubric.has_group_rewards:
        raise RecipeError(f"env verifiers:{name}: its rubric scores groups; a reward of ours is of one answer")
    return Verifiers(name, env, _Api())
