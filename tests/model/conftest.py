"""Fixtures of the model tests: a shape in which no two sizes are equal."""

from __future__ import annotations

import pytest

from ossia.model.arch import Arch


@pytest.fixture(scope="session")
def small() -> Arch:
    return Arch(
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        num_experts=5,
        experts_per_token=3,
        sliding_window=8,
        vocab_size=265,
        layer_types=("sliding_attention", "full_attention"),
    )
