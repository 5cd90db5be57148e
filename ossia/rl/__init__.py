"""Reinforcement learning: environments, the jail that runs what a model wrote, rollouts, advantages."""
