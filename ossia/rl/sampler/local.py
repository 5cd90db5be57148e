"""Sampling with this process's engine: it reads the very tensors that are trained, so there is nothing to hand over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ossia.engine import Completion, Request, Session, completion
from ossia.engine.request import Token
from ossia.errors import UserError


class EngineSampler:
    """An engine's session as a rollout's sampler."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tokens: dict[int, list[Token]] = {}
        self.counts: Mapping[str, int] = {}

    def refresh(self, version: int) -> None:
        """See Sampler."""

    def add(self, request: Request) -> int:
        """See Sampler."""
        number = self._session.add(request)
        self._tokens[number] = []
        return number

    def answers(self) -> Iterator[tuple[int, Completion]]:
        """See Sampler."""
        while not self._session.idle:
            for token in self._session.step():
                self._tokens[token.request].append(token)
                if token.finish is not None:
                    if token.error is not None:
                        raise UserError(f"sampling: {token.error}")
                    yield token.request, completion(self._tokens.pop(token.request))
