"""A small prepared demo folder, made once: building the vocabulary takes most of these tests' time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ossia.demo.conversations import Sizes
from ossia.demo.prepare import Plan, prepare

SMALL = Plan(
    sizes=Sizes(train_sorting=60, train_chats=120, heldout_sorting=4, heldout_chats=4, questions=4),
    steps=4,
    tokens_per_step=512,
    evaluations=2,
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with data, tokenizer, untrained checkpoint and recipe."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    prepare(folder, seed=0, plan=SMALL)
    return folder
