"""Fixtures that many folders share: vocabularies and seeded checkpoints, each made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels are then interpreted on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

from ossia.demo.fixture import trained_fixture
from ossia.harmony.o200k import prune, write_o200k_harmony
from ossia.model.arch import SHAPES, Arch, Layout
from ossia.model.tiny import make_tiny

PRINTABLE = [chr(code) for code in range(32, 127)]
SENTENCES = ["You are ChatGPT, a large language model trained by OpenAI.", "The weather in Paris is sunny today."]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors: a second thread would only be waited for, and one is the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def o200k_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full o200k_harmony `tokenizer.json`."""
    return write_o200k_harmony(tmp_path_factory.mktemp("o200k"))


@pytest.fixture(scope="session")
def small_tokenizer(o200k_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned `tokenizer.json` of a few hundred tokens, every byte among them."""
    text, _ = prune(o200k_tokenizer.read_text(encoding="utf-8"), PRINTABLE + SENTENCES)
    file = tmp_path_factory.mktemp("small") / "tokenizer.json"
    file.write_text(text, encoding="utf-8")
    return file


MakeTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """`tiny(arch=..., weights=..., seed=...)`: a seeded checkpoint with the small vocabulary, made once."""
    made: dict[tuple[Arch, Layout, int], Path] = {}

    def make(arch: Arch = SHAPES["demo"], weights: Layout = "mxfp4", seed: int = 0) -> Path:
        key = (arch, weights, seed)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / "model"
            make_tiny(made[key], arch, seed=seed, weights=weights, tokenizer=small_tokenizer)
        return made[key]

    return make


@pytest.fixture(scope="session")
def trained(pytestconfig: pytest.Config) -> Path:
    """A demo model that learnt its conversations, bf16 layout; in pytest's cache until the code that trains it changes.

    Random routers choose other experts under rounding; what is said of bf16 is said of this one.
    """
    return trained_fixture(pytestconfig.cache.mkdir("trained"))


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """A test's time limit leaves out the training of the model that it may be the first to ask for."""
    for item in items:
        if "trained" in item.fixturenames:
            item.add_marker(pytest.mark.timeout(func_only=True))
