"""Environments behind an OpenEnv server: `openenv:http://HOST:PORT`. Each episode is a session of its own there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ossia.errors import MissingExtraError, RecipeError
from ossia.rl.adapters.talk import Reply, Talk, numbers_of


class _Result(Protocol):
    """What is used of OpenEnv's `StepResult`."""

    observation: dict[str, Any]
    reward: float | None
    done: bool


class _Client(Protocol):
    """What is used of OpenEnv's `GenericEnvClient`."""

    def reset(self, **given: Any) -> _Result: ...
    def step(self, action: dict[str, Any]) -> _Result: ...
    def close(self) -> None: ...


class _World:
    def __init__(self, client: _Client, action: str, observation: str, more: Mapping[str, Any]) -> None:
        self._client, self._action, self._observation, self._more = client, action, observation, more

    def reset(self, seed: int) -> str:
        return self._seen(self._client.reset(seed=seed))

    def step(self, text: str) -> Reply:
        result = self._client.step({**self._more, self._action: text})
        figures = numbers_of(result.observation)
        return Reply(self._seen(result), float(result.reward or 0.0), bool(result.done), metrics=figures)

    def close(self) -> None:
        self._client.close()

    def _seen(self, result: _Result) -> str:
        if self._observation not in result.observation:
            raise RecipeError(
                f"env openenv: `observation` is {self._observation!r}, which the server's observations lack\n"
                f"  allowed: {', '.join(result.observation)}"
            )
        return str(result.observation[self._observation])


def load(
    name: str, *, action: str, observation: str, instruction: str = "", fields: Mapping[str, Any] | None = None
) -> Talk:
    """The environment of a server that runs.

    name         its address
    action       the field of an action that the answer goes into; `fields` are its other ones
    observation  the field of an observation that the model sees
    instruction  what the developer message says
    Raises       MissingExtraError; RecipeError where no server answers, or its observations lack that field
    """
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ImportError as error:
        raise MissingExtraError(f"env openenv:{name}: needs openenv-core: pip install 'ossia[openenv]'") from error

    def make() -> _World:
        return _World(GenericEnvClient(base_url=name), action, observation, fields or {})

    world = make()
    try:
        world.reset(0)
    except (ConnectionError, RuntimeError) as error:
        raise RecipeError(f"env openenv:{name}: {error}\n  next: start the server, or mend the address") from error
    finally:
        world.close()
    return Talk(make, instruction)
