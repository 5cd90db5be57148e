"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from ossia.model.arch import Arch
from tests.shapes import UNEQUAL


@pytest.fixture(scope="session")
def small() -> Arch:
    """A shape in which no two sizes are equal."""
    return UNEQUAL
