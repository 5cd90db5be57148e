"""What a rollout samples with: this process's engine, or a server."""

from ossia.rl.sampler.base import Sampler
from ossia.rl.sampler.local import EngineSampler
from ossia.rl.sampler.opening import open_sampler, rollout_server

__all__ = ["EngineSampler", "Sampler", "open_sampler", "rollout_server"]
