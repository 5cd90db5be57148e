"""Generation for many requests at once, from the same weights and the live adapter that training uses."""

from ossia.engine.engine import Engine, completion, default_cache_bytes
from ossia.engine.request import Completion, Constraint, Finish, PromptToken, Request, Token, harmony_stops
from ossia.engine.sampler import Sampling
from ossia.engine.session import Session

__all__ = [
    "Completion",
    "Constraint",
    "Engine",
    "Finish",
    "PromptToken",
    "Request",
    "Sampling",
    "Session",
    "Token",
    "completion",
    "default_cache_bytes",
    "harmony_stops",
]
