"""A small prepared demo folder, made once: building the vocabulary takes most of these tests' time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ossia.demo.prepare import prepare
from tests.demo.support import SMALL


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with data, tokenizer, untrained checkpoint and recipe."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    prepare(folder, seed=0, plan=SMALL)
    return folder
