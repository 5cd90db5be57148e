"""Fixtures of the model tests: a tokenizer of single bytes, and a shape in which no two sizes are equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from ossia.model.arch import Arch
from tests.data.conftest import byte_tokenizer_json


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_text(byte_tokenizer_json(), encoding="utf-8")
    return file


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
