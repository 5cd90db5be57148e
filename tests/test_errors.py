"""What errors have in common."""

from __future__ import annotations

import pytest

from ossia.errors import first_few


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, []),
        (1, ["0"]),
        (3, ["0", "1", "2"]),
        (4, ["0", "1", "2", "and 1 more"]),
        (5003, ["0", "1", "2", "and 5,000 more"]),
    ],
)
def test_a_long_list_is_cut_and_says_how_many_are_left_out(number: int, expected: list[str]) -> None:
    assert first_few([str(index) for index in range(number)], most=3) == expected
