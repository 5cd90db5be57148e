"""What a rollout asks of whatever samples for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from ossia.engine import Completion, Request


class Sampler(Protocol):
    """Continues prompts with the policy. One thread owns it.

    counts  what went wrong and was put right, by name, since the run began or went on
    """

    counts: Mapping[str, int]

    def refresh(self, version: int) -> None:
        """From here on sample with the policy as it is now.

        version  how many updates it has had; the same number means the same weights
        Raises   UserError if it can't be had
        """

    def add(self, request: Request) -> int:
        """Take a request; its number. Raises UserError if it can never be answered."""

    def answers(self) -> Iterator[tuple[int, Completion]]:
        """Each request's number and answer, as they end, until none is left. Raises UserError where one has none."""
