"""What the machine has to give for some of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ossia.rl.jail import Jail, JailError


@pytest.fixture(scope="module")
def tools() -> Iterator[Jail]:
    try:
        jail = Jail("tools")
    except JailError as error:
        pytest.skip(str(error))
    with jail:
        yield jail
