"""Generation for many requests at once, from the same weights and the live adapter that training uses."""

from ossia.engine.engine import Completion, Engine, Request, Token, harmony_stops
from ossia.engine.sampler import Sampling

__all__ = ["Completion", "Engine", "Request", "Sampling", "Token", "harmony_stops"]
