"""A small trained model, an adapter trained on it, and its exports, made once a session; what every client is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.clients.compare import Questions
from benchmarks.clients.exports import Exports, make_exports, questions
from ossia.demo.prepare import DATA


@pytest.fixture(scope="session")
def exports(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Everything that `ossia export` makes of the model `trained` and of an adapter on it."""
    return make_exports(trained, tmp_path_factory.mktemp("clients") / "exports")


@pytest.fixture(scope="session")
def asked(exports: Exports, trained: Path) -> Questions:
    """Held-out texts, and twenty held-out prompts: sorting questions, and openings of chats with tools."""
    return questions(exports.base, trained.parent / DATA)
