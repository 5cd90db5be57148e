"""Questions with an answer: read exactly where it can be, checked by math-verify inside the jail where it can't."""

from ossia.rl.envs.math.env import Math

__all__ = ["Math"]
