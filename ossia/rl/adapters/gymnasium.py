"""Gymnasium environments whose observations and actions are text: `gymnasium:ENV_ID`, `gymnasium:MODULE:ENV_ID`."""

from __future__ import annotations

from typing import Any, Protocol

from ossia.errors import MissingExtraError, RecipeError
from ossia.rl.adapters.talk import Reply, Talk, numbers_of


class _Space(Protocol):
    def contains(self, x: Any) -> bool: ...


class _Env(Protocol):
    """What is used of a `gymnasium.Env`."""

    action_space: _Space

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]: ...
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]: ...
    def close(self) -> None: ...


class _World:
    def __init__(self, env: _Env) -> None:
        self._env = env

    def reset(self, seed: int) -> str:
        return self._env.reset(seed=seed)[0]

    def step(self, text: str) -> Reply | None:
        if not self._env.action_space.contains(text):
            return None
        seen, reward, terminated, truncated, info = self._env.step(text)
        return Reply(seen, float(reward), bool(terminated), bool(truncated), numbers_of(info))

    def close(self) -> None:
        self._env.close()


def load(name: str, *, instruction: str = "", **options: Any) -> Talk:
    """An environment that is registered with Gymnasium.

    name         its id, `MODULE:ID` to import the module first
    instruction  what the developer message says
    options      for its own constructor
    Raises       MissingExtraError; RecipeError for an id that isn't registered, or whose spaces aren't `Text`
    """
    try:
        import gymnasium
    except ImportError as error:
        raise MissingExtraError(f"env gymnasium:{name}: needs gymnasium: pip install 'ossia[rl-envs]'") from error

    def make() -> _World:
        return _World(gymnasium.make(name, **options))

    try:
        tried = gymnasium.make(name, **options)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise RecipeError(f"env gymnasium:{name}: can't be made with {options}: {error}") from error
    spaces = {"observation_space": tried.observation_space, "action_space": tried.action_space}
    tried.close()
    for which, space in spaces.items():
        if not isinstance(space, gymnasium.spaces.Text):
            raise RecipeError(
                f"env gymnasium:{name}: its {which} is {space}; expected: Text\n"
                "  next: wrap it so that it is seen and acted on in text (gymnasium.ObservationWrapper, ActionWrapper)"
            )
    return Talk(make, instruction)
