"""The engine's thread: it alone owns the session. Requests and cancellations go in, tokens come out.

```text
event loop: submit, cancel --inbox--> engine thread: add, cancel, step --one wake-up a step--> a queue per HTTP request
follower:   replace -------newer---->                 replace
```
The event loop counts what is outstanding, so that a full server says so at once, without asking the thread.
An error that isn't about one request ends the answers that were running with an id under which the log says more; if
it was the model's output or memory, the thread goes on with a new session, else the server ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

from ossia.engine import Engine, PromptToken, Request, Session, Token
from ossia.errors import UserError
from ossia.model.lora import Lora
from ossia.web.metrics import IDLE, Load, Metrics
from ossia.web.protocol.errors import ApiError, internal, stuck
from ossia.web.protocol.prompts import Echo

log = logging.getLogger("ossia.web")
RETRY_AFTER_S = 1


class Accepted(NamedTuple):
    """The session has taken the requests; `step`: of its run's checkpoint that the adapter is, where it is one."""

    step: int | None


class Sampled(NamedTuple):
    """A token of one of the choices."""

    choice: int
    token: Token


class Echoed(NamedTuple):
    """The prompt of one of the choices, scored where that was asked for; `whole`: nothing is sampled after it."""

    choice: int
    prompt: tuple[PromptToken, ...]
    whole: bool


class Failed(NamedTuple):
    """There is no answer, or no more of it."""

    error: ApiError


Event = Accepted | Sampled | Echoed | Failed


@dataclass(eq=False, slots=True)
class Ticket:
    """Requests that were submitted together: the choices of one answer.

    echo    what is said of their prompts first
    events  what happens to them
    open    choices that aren't finished; the event loop's own
    """

    requests: tuple[Request, ...]
    echo: Echo | None
    submitted_s: float
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    open: set[int] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Running:
    """A sequence in the session: the engine thread's own."""

    ticket: Ticket
    choice: int
    last_s: float | None = None  # when its last token came


class _Scoring(NamedTuple):
    """Prompts of some choices of an answer, each once, while they are scored; `work` None: they are only told."""

    ticket: Ticket
    choices: list[int]
    prompts: list[tuple[int, ...]]
    work: Generator[None, None, list[list[PromptToken]]] | None


class Worker:
    """Owns an engine's session on a thread of its own. `submit` and `cancel` are for the event loop's thread.

    name         of the model, in the metrics
    max_queue    sequences that may wait beyond those that run
    outstanding  sequences submitted and not finished
    dead         the thread has ended by a fault: nothing can be answered any more
    steps        of adapters that are checkpoints of a run: which step each is at
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        max_queue: int,
        metrics: Metrics,
        steps: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._engine, self.room = engine, engine.max_batch + max_queue
        self.metrics, self._server_metrics = metrics.of(name, self.load), metrics
        self.outstanding, self.dead = 0, False
        self.steps = dict(steps)
        for adapter, step in steps.items():
            metrics.adapter(adapter, step)
        self._newer: dict[str, tuple[Lora, int]] = {}  # adapters to be replaced
        self._load = IDLE
        self._inbox: deque[tuple[Ticket, int | None]] = deque()  # a choice to cancel, or None: to add
        self._wake = threading.Condition()
        self._stopping = False
        self._tickets: set[Ticket] = set()  # with open choices
        self._running: dict[int, _Running] = {}  # by the session's numbers
        self._numbers: dict[tuple[Ticket, int], int] = {}
        self._echoing: deque[tuple[Ticket, int]] = deque()  # choices whose prompts are to be told first
        self._scoring: _Scoring | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="ossia-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def load(self) -> Load:
        """How busy the engine was after its last step."""
        return self._load

    def replace(self, adapter: str, lora: Lora, step: int) -> None:
        """Let an adapter be this one, of this step of its run, for the requests from now on. Any thread may say so.

        Those that run end with the version they began with. While some still use the one before the last, it waits;
        a newer one that comes meanwhile takes its place.
        """
        with self._wake:
            self._newer[adapter] = (lora, step)
            self._wake.notify()

    # --- the event loop's side

    def submit(self, requests: Sequence[Request], echo: Echo | None = None) -> Ticket:
        """Ask for answers. Raises ApiError 429 where there is no room for them, 503 where the engine has ended."""
        if len(requests) > self.room:
            raise ApiError(f"n: {len(requests)} sequences at once; this server takes up to {self.room}", param="n")
        if self.outstanding + len(requests) > self.room:
            message = f"the server is full: {self.outstanding} sequences run or wait; try again in a moment"
            raise ApiError(message, status=429, code="overloaded", headers={"Retry-After": str(RETRY_AFTER_S)})
        self._loop = asyncio.get_running_loop()
        ticket = Ticket(tuple(requests), echo, time.monotonic(), open=set(range(len(requests))))
        self._send([(ticket, None)])
        self.outstanding += len(requests)
        self._tickets.add(ticket)
        return ticket

    def cancel(self, ticket: Ticket, choice: int | None = None) -> None:
        """Drop a choice, or all of them: no token of it comes any more. A finished one: nothing."""
        dropped = ticket.open & ({choice} if choice is not None else ticket.open)
        for one in dropped:
            self._finished(ticket, one)
        if dropped and not self.dead:
            self._send([(ticket, one) for one in dropped])

    def fail_all(self, error: ApiError) -> int:
        """End every answer with an error; returns how many there were."""
        tickets = list(self._tickets)
        for ticket in tickets:
            self.cancel(ticket)
            ticket.events.put_nowait(Failed(error))
        return len(tickets)

    def stop(self) -> None:
        """End the thread after its step, and wait for it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _send(self, commands: Sequence[tuple[Ticket, int | None]]) -> None:
        with self._wake:
            if self.dead:
                raise ApiError("the engine has stopped; see the server's log", status=503, code="engine_stopped")
            self._inbox.extend(commands)
            self._wake.notify()

    def _finished(self, ticket: Ticket, choice: int) -> None:
        if choice in ticket.open:
            ticket.open.remove(choice)
            self.outstanding -= 1
        if not ticket.open:
            self._tickets.discard(ticket)

    def _deliver(self, news: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in news:
            if isinstance(event, Sampled):
                if event.choice not in ticket.open:
                    continue  # cancelled while the step ran
                if event.token.finish is not None:
                    self._finished(ticket, event.choice)
            elif isinstance(event, Echoed):
                if event.choice not in ticket.open:
                    continue
                if event.whole:
                    self._finished(ticket, event.choice)
            elif isinstance(event, Failed):
                self.cancel(ticket)
            ticket.events.put_nowait(event)

    # --- the thread's side

    def _main(self) -> None:
        ended = False
        try:
            while not self._stopping:
                self._run(self._engine.session())
            ended = True
        finally:
            if not ended:
                with self._wake:
                    self.dead = True
                self._fail_running("the engine's thread has ended; its error follows")

    def _run(self, session: Session) -> None:
        """Step until told to stop, or until the session is of no use any more."""
        try:
            while self._take(session):
                self._tell_prompts(session)
                self._step(session)
        except (UserError, MemoryError, torch.OutOfMemoryError) as error:
            self._fail_running(f"a step failed: {error}")

    def _take(self, session: Session) -> bool:
        """Wait for work, and do what the inbox says. Returns False when it is time to stop."""
        with self._wake:
            busy = self._echoing or not session.idle
            while not (self._inbox or self._newer or busy or self._stopping):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            held = {ticket.requests[0].adapter for ticket, _ in self._echoing}  # an answer is of one version
            ready = [name for name in self._newer if name not in held and not session.is_replacing(name)]
            newer = {adapter: self._newer.pop(adapter) for adapter in ready}
        for adapter, (read, step) in newer.items():
            lora = read.to(self._engine.model.device)  # here and not where it is read: a CUDA graph may be captured
            session.replace(adapter, lora)
            self._engine.adapters[adapter] = lora
            self.steps[adapter] = step
            self._server_metrics.adapter(adapter, step)
            log.info("adapter %s: now at step %d", adapter, step)
        news: list[tuple[Ticket, Event]] = []
        for ticket, choice in commands:
            if choice is None and ticket.echo is not None:
                self._echoing += [(ticket, one) for one in range(len(ticket.requests))]
                news.append((ticket, self._accepted(ticket)))
            elif choice is None:
                problem = self._add(session, ticket, range(len(ticket.requests)))
                news.append((ticket, problem or self._accepted(ticket)))
            elif (ticket, choice) in self._echoing:
                self._echoing.remove((ticket, choice))
            elif (number := self._numbers.pop((ticket, choice), None)) is not None:
                session.cancel(number)
                del self._running[number]
        self._note(session)
        self._tell(news)
        return not self._stopping

    def _accepted(self, ticket: Ticket) -> Accepted:
        adapter = ticket.requests[0].adapter
        return Accepted(None if adapter is None else self.steps.get(adapter))

    def _add(self, session: Session, ticket: Ticket, choices: Iterable[int]) -> Failed | None:
        """Let some choices of an answer join; all of them or none."""
        added: dict[int, int] = {}
        try:
            for choice in choices:
                number = added[choice] = session.add(ticket.requests[choice])
                self._running[number] = _Running(ticket, choice)
                self._numbers[ticket, choice] = number
        except UserError as error:
            for choice, number in added.items():
                session.cancel(number)
                del self._running[number], self._numbers[ticket, choice]
            return Failed(ApiError.of(error))
        return None

    def _tell_prompts(self, session: Session) -> None:
        """One answer's next prompts, about as many tokens as a step reads; then those choices may be sampled.

        They are scored in parts, one a call, so that what runs goes on between.
        """
        if not self._echoing:
            self._scoring = None
            return
        if self._scoring is None or not self._still(self._scoring):
            self._scoring = self._begin_scoring(session)
        scoring = self._scoring
        try:
            if scoring.work is not None:
                next(scoring.work)
                return
            told = [[PromptToken(number, None) for number in ids] for ids in scoring.prompts]
        except StopIteration as done:
            told = done.value
        except UserError as error:
            self._echoing = deque(each for each in self._echoing if each[0] is not scoring.ticket)
            return self._tell([(scoring.ticket, Failed(ApiError.of(error)))])
        self._tell_scored(session, scoring.ticket, self._still(scoring), dict(zip(scoring.prompts, told, strict=True)))

    def _still(self, scoring: _Scoring) -> list[int]:
        """The choices that somebody waits for."""
        return [choice for choice in scoring.choices if (scoring.ticket, choice) in self._echoing]

    def _begin_scoring(self, session: Session) -> _Scoring:
        ticket, num_tokens = self._echoing[0][0], 0
        echo, choices = ticket.echo, list[int]()
        for other, choice in self._echoing:
            if other is not ticket or num_tokens >= self._engine.prefill_tokens:
                break
            choices.append(choice)
            num_tokens += len(ticket.requests[choice].ids)
        assert echo is not None
        requests = [ticket.requests[choice] for choice in choices]
        prompts = list(dict.fromkeys(tuple(request.ids) for request in requests))  # that of several choices once
        if echo.top is None:
            return _Scoring(ticket, choices, prompts, None)
        work = session.scoring(prompts, adapter=requests[0].adapter, top=echo.top)
        return _Scoring(ticket, choices, prompts, work)

    def _tell_scored(
        self, session: Session, ticket: Ticket, choices: list[int], of: Mapping[tuple[int, ...], Sequence[PromptToken]]
    ) -> None:
        echo, self._scoring = ticket.echo, None
        assert echo is not None
        for choice in choices:
            self._echoing.remove((ticket, choice))
        news: list[tuple[Ticket, Event]] = [
            (ticket, Echoed(choice, tuple(of[tuple(ticket.requests[choice].ids)]), echo.alone)) for choice in choices
        ]
        if not echo.alone and (problem := self._add(session, ticket, choices)) is not None:
            news.append((ticket, problem))
        self._tell(news)

    def _step(self, session: Session) -> None:
        if session.idle:
            return
        tokens = session.step()
        now = time.monotonic()
        news: list[tuple[Ticket, Event]] = []
        first_s, between_s = [], []
        for token in tokens:
            running = self._running[token.request]
            if running.last_s is None:
                first_s.append(now - running.ticket.submitted_s)
            else:
                between_s.append(now - running.last_s)
            running.last_s = now
            if token.finish is not None:
                del self._running[token.request], self._numbers[running.ticket, running.choice]
            event = Sampled(running.choice, token) if token.error is None else Failed(stuck(token.error))
            news.append((running.ticket, event))
        self._note(session)
        self._tell(news)
        self.metrics.tokens(len(tokens), first_s, between_s)

    def _note(self, session: Session) -> None:
        cache = session.cache
        self._load = Load(session.num_running, session.num_waiting, cache.num_used, cache.used_bytes, cache.max_bytes)

    def _fail_running(self, words: str) -> None:
        """End what runs with an error whose number is in the log."""
        number = f"err_{secrets.token_hex(8)}"
        log.error("%s: %s (%d sequences were running)", number, words, len(self._running))
        with self._wake:
            waiting = [ticket for ticket, choice in self._inbox if choice is None]
            self._inbox.clear()
        echoing = [ticket for ticket, _ in self._echoing]
        tickets = dict.fromkeys([running.ticket for running in self._running.values()] + echoing + waiting)
        self._echoing.clear()
        self._scoring = None
        self._running.clear()
        self._numbers.clear()
        self._load = IDLE
        self._tell([(ticket, Failed(internal(number))) for ticket in tickets])

    def _tell(self, news: list[tuple[Ticket, Event]]) -> None:
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, news)
