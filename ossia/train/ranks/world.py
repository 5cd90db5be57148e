"""The ranks of a job: what they tell each other, how one notices that another is gone, and how a failure gets its name.

Two ways lead from rank to rank. Words go through the launcher's key-value store (`gather`): whoever is missing there is
known by number, so a rank that was killed, stopped or never came is named, and a rank that fails leaves its reason for
the others to stop with. Tensors go through gloo or NCCL, after a `gather` that all have come to, and with nothing but
computing in between. A thread of each rank says once a second that the process lives; whoever waits counts the silence
with its own clock, so clocks that differ or jump don't matter.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ossia.errors import Interrupted, RunError, UserError
from ossia.sizes import num_cores
from ossia.train.ranks.launched import Launched, launched

_T = TypeVar("_T")
_STDERR = 2
_BEAT_S = 1.0
_POLL_S = 0.02
_LOOK_S = 0.5  # between two looks at who is missing
_GONE_S = 6.0  # of silence, once the launcher or a broken connection has told that something is wrong


class PeerError(RunError):
    """Another rank has failed, and says itself why: `said`, its number and its words."""

    def __init__(self, message: str, said: tuple[int, str]) -> None:
        super().__init__(message)
        self.said = said


class _Line:
    """One of the lines on which ranks tell each other words, each used by one thread of a rank.

    store     with the thread's own connection, as waiting blocks one
    name      before the keys
    asked_at  when the thread last asked the store for something, while it waits; else None
    """

    def __init__(self, store: dist.Store, name: str) -> None:
        self.store, self.name = store, name
        self.number = 0
        self.asked_at: float | None = None


class World:
    """All ranks, as one of them sees them. Left by an error, it leaves the reason for the others.

    rank, size   this one's number, and how many there are
    local_size   of them on this machine
    on_one_host  whether all of them are on this machine
    again        whether the launcher has started them once more, after they had begun: they go on where they were
    device       where its tensors are
    timeout_s    how long a rank waits for another that isn't known to be busy
    step         the step at hand, for messages; 0 before the first
    hurried      whether this process has been asked to stop; whoever is waited for has little time then
    stop_agreed  whether any rank had been asked to at the end of the last step
    """

    def __init__(self, place: Launched, device: torch.device, timeout_s: float) -> None:
        """Meet the other ranks. Raises RunError if they don't come in time."""
        self.rank, self.size, self.device, self.timeout_s = place.rank, place.size, device, timeout_s
        self.local_size, self.on_one_host = place.local_size, place.local_size == place.size
        self.step, self.stop_agreed = 0, False
        self.hurried: Callable[[], bool] = lambda: False
        self._busy_with = ""
        limit = timedelta(seconds=timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            shared, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=limit))
            self._every_start = dist.PrefixStore("ossia", shared)
            store = dist.PrefixStore(self._meet(), self._every_start)
            self.again = self._every_start.check(["begun"])
            dist.init_process_group(
                backend,
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=limit,
                device_id=device if device.type == "cuda" else None,
            )
        except RuntimeError as error:  # of the store, gloo or NCCL
            raise RunError(
                f"rank {self.rank}: the other ranks can't be reached: {_first_words(error)}\n"
                "  next: start all ranks with the same --nnodes and --rdzv-endpoint, and let that port through"
            ) from error
        self._store = dist.PrefixStore("words", store)
        self._words = _Line(self._store, "")
        self._beside = _Line(self._store.clone(), "beside/")
        self._own = self._store.clone()
        self._own.set(f"beat/{self.rank}", "0 ")
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _meet(self) -> str:
        """A name for this start of the ranks that no other start has: launchers keep one store for all of them.

        Each rank writes a number of its own; the first lists them until every rank has found itself in the list.
        """
        store, mine, end = self._every_start, uuid.uuid4().hex, time.monotonic() + self.timeout_s
        store.set(f"came/{self.rank}", mine)
        came = [f"came/{rank}" for rank in range(self.size)]
        while time.monotonic() < end:
            if self.leads:
                here = [f"{mine}/{rank}" for rank in range(1, self.size)]
                if store.check(here):
                    return mine
                if store.check(came):
                    store.set("list", json.dumps([text.decode() for text in store.multi_get(came)]))
            elif store.check(["list"]):
                listed = json.loads(store.get("list"))
                if len(listed) == self.size and listed[self.rank] == mine:
                    store.set(f"{listed[0]}/{self.rank}", "")
                    return listed[0]
            time.sleep(_POLL_S)
        raise RuntimeError(f"they didn't come within {self.timeout_s:g} s")

    def has_begun(self) -> None:
        """Should the launcher start the ranks again, they go on from here on, not begin."""
        self._every_start.set("begun", "")

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes the run folder and talks."""
        return self.rank == 0

    @property
    def _here(self) -> str:
        return f"rank {self.rank}{self._when}"

    @property
    def _when(self) -> str:
        return f", step {self.step}" if self.step else ""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), by rank; all ranks call this in the same order.

        Raises  PeerError where another rank has failed; RunError naming the ranks that don't come in time
        """
        return self._exchange(self._words, value)

    def gather_beside(self, value: Any) -> list[Any]:
        """`gather` for what each rank does besides its steps, in a thread of its own or not: it waits however long the
        others take, as long as their processes live."""
        return self._exchange(self._beside, value)

    def _exchange(self, line: _Line, value: Any) -> list[Any]:
        line.number += 1
        keys = [f"{line.name}{line.number}/{rank}" for rank in range(self.size)]
        line.asked_at = time.monotonic()
        try:
            line.store.set(keys[self.rank], json.dumps(value))
            self._await(line, keys)
            found = [json.loads(text) for text in line.store.multi_get(keys)]
            # whoever is here has read it
            line.store.delete_key(f"{line.name}{line.number - 1}/{self.rank}")
        except dist.DistError as error:
            raise RunError(f"{self._lost_store} ({_first_words(error)})\n  next: see what they say") from error
        finally:
            line.asked_at = None
        return found

    def from_first(self, value: Any) -> Any:
        """Rank 0's value (JSON); what the others give doesn't matter."""
        return self.gather(value if self.leads else None)[0]

    def end_of_step(self, peak_bytes: int) -> list[int]:
        """Agree whether to stop; every rank's most memory so far."""
        said = self.gather([self.hurried(), peak_bytes])
        self.stop_agreed = self.stop_agreed or any(asked for asked, _ in said)
        return [peak for _, peak in said]

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Meanwhile the others wait for this rank however long it takes, as long as its process lives."""
        self._busy_with = doing
        try:
            yield
        finally:
            self._busy_with = ""

    def sum_over_ranks(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, contiguous, by the sum of all ranks' of that place: the same bits on all."""
        self._together(tensors, lambda tensor: dist.all_reduce(tensor))

    def begin_gather(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        """Begin to put every rank's `part`, contiguous and all of one size, by rank into `whole`; what is returned
        waits for that. NCCL gathers on a stream of its own, behind what has been launched by now; gloo in a thread."""
        return self._begin(lambda: dist.all_gather_into_tensor(whole, part, async_op=True))

    def begin_sum(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        """Begin to put this rank's equal part of the sum of all ranks' `whole` into `part`; as `begin_gather`."""
        return self._begin(lambda: dist.reduce_scatter_tensor(part, whole, async_op=True))

    def total(self, value: float) -> float:
        """The sum over ranks, the same number on each."""
        return math.fsum(self.gather(value))

    def exchange(
        self, rows: Tensor, given: Sequence[int], into: Tensor, taken: Sequence[int], among: dist.ProcessGroup | None
    ) -> None:
        """Give each rank of a group (None: of all) so many rows, contiguous, and put theirs into `into`, by rank."""
        self._together([into], lambda into: dist.all_to_all_single(into, rows, [*taken], [*given], group=among))

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, contiguous, by rank 0's."""
        self._together(tensors, lambda tensor: dist.broadcast(tensor, src=0))

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor, contiguous, to a rank that is about to `receive` it."""
        self._together((tensor,), lambda tensor: dist.send(tensor, to))

    def receive(self, tensor: Tensor, of: int) -> None:
        """Replace a tensor, contiguous, by what a rank sends."""
        self._together((tensor,), lambda tensor: dist.recv(tensor, of))

    def _begin(self, start: Callable[[], Any]) -> Callable[[], None]:
        """Start an exchange; what is returned waits for its end."""
        begun = list[Any]()
        with _old_names():
            self._together([start], lambda start: begun.append(start()))
        return lambda: self._together(begun, lambda work: work.wait())

    def _together(self, tensors: Iterable[_T], act: Callable[[_T], object]) -> None:
        try:
            for tensor in tensors:
                act(tensor)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo and NCCL raise
            watch = _Watch(self._store, [rank for rank in range(self.size) if rank != self.rank])
            while not (gone := watch.silent(_GONE_S)) and watch.waited() < 2 * _GONE_S:
                self._words.asked_at = time.monotonic()
                self._stop_with_peer(self._store)
                time.sleep(_LOOK_S)
                watch.look()
            whose = _ranks(gone) if gone else self._here.partition(",")[0]
            what = "is gone: it broke off and gives no sign of life" if gone else "lost its connection to another rank"
            raise RunError(f"{whose}{self._when}: {what} ({_first_words(error)})") from error

    def _await(self, line: _Line, keys: list[str]) -> None:
        """Wait until every rank has given its value."""
        watch = _Watch(line.store, range(self.size))
        looked = 0.0
        while not line.store.check(keys):  # the store's own wait would notice neither a failure elsewhere nor silence
            line.asked_at = time.monotonic()
            time.sleep(min(_POLL_S, _POLL_S / 50 + watch.waited() / 20))
            if watch.waited() - looked < _LOOK_S:
                continue
            looked = watch.waited()
            self._stop_with_peer(line.store)
            watch.look()
            silent = watch.silent(min(_GONE_S, self.timeout_s / 2))
            late = watch.silent(self.timeout_s) if line is self._beside else watch.idle(self.timeout_s)
            late = silent if self.hurried() else late
            missing = [rank for rank, key in enumerate(keys) if rank in late and not line.store.check([key])]
            if missing:
                dead = set(missing) <= set(silent)
                how = "gives no sign of life" if dead else "lives, but didn't come to where the others wait"
                limit = f"waited {watch.waited():.0f} s; parallel.timeout is {self.timeout_s:g}"
                raise RunError(f"{_ranks(missing)}{self._when}: {how} ({limit})")

    def _stop_with_peer(self, store: dist.Store) -> None:
        if store.check(["failure"]):
            raise self.because_of(*json.loads(store.get("failure")))

    def because_of(self, rank: int, text: str) -> RunError:
        """The error with which this rank stops, as another has failed and said so; or this one itself, in a thread."""
        if rank == self.rank:
            return RunError(self._named(text))
        return PeerError(f"{self._here}: stopped, as rank {rank} has said: {text.splitlines()[0]}", (rank, text))

    def _named(self, text: str) -> str:
        """An error's words with this rank and step, unless they name one."""
        return text if text.startswith("rank ") else f"{self._here}: {text.removeprefix(f'step {self.step}: ')}"

    @property
    def _lost_store(self) -> str:
        return f"{self._here}: the store through which the ranks talk, on the first host, is gone or out of reach"

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(_BEAT_S):
            asked = [line.asked_at for line in (self._words, self._beside)]
            if any(at is not None and time.monotonic() - at > self.timeout_s for at in asked):
                # a thread sits in a read that has no end where the connection is lost without a word
                os.write(_STDERR, f"{self._lost_store}: no answer for {self.timeout_s:g} s\n".encode())
                os._exit(RunError.exit_code)
            number += 1
            try:
                self._own.set(f"beat/{self.rank}", f"{number} {self._busy_with}")
            except dist.DistError:
                return  # the main thread finds out where it next needs the store

    def __enter__(self) -> Self:
        self._quiet = contextlib.ExitStack()
        if not self.leads:
            nowhere = self._quiet.enter_context(open(os.devnull, "w"))
            self._quiet.enter_context(contextlib.redirect_stdout(nowhere))
            self._quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.close()
        try:
            self._end(error)
        finally:
            self._ended.set()
            self._heart.join()
        if error is None:
            dist.destroy_process_group()

    def _end(self, error: BaseException | None) -> None:
        """Give an error the name of its rank and step, and leave it for the others, unless one of them was first."""
        if error is None:
            return
        if isinstance(error, PeerError):  # of which the others, that rank itself among them, may not have heard
            with contextlib.suppress(dist.DistError):
                self._words.asked_at = time.monotonic()
                self._store.compare_set("failure", "", json.dumps(error.said))
            return
        if isinstance(error, Interrupted):  # all of them are; one says so
            if not self.leads:
                raise SystemExit(error.exit_code) from None
            return
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        text = self._named(text)
        mine = json.dumps([self.rank, text])
        self._words.asked_at = time.monotonic()
        try:
            first = self._store.compare_set("failure", "", mine).decode()
        except dist.DistError:
            first = mine
        if first != mine:
            raise self.because_of(*json.loads(first)) from error
        if isinstance(error, UserError):
            raise RunError(text) from error
        error.add_note(self._here)


class _Watch:
    """How long ago each rank was last heard of, and how long it has had nothing to do, by this process's clock."""

    def __init__(self, store: dist.Store, ranks: Iterable[int]) -> None:
        self._store, self._began = store, time.monotonic()
        self._beats: dict[int, bytes] = dict.fromkeys(ranks, b"")
        self._heard = dict.fromkeys(self._beats, self._began)
        self._busy = dict(self._heard)

    def look(self) -> None:
        """Read every rank's last sign of life."""
        now = time.monotonic()
        for rank, before in self._beats.items():
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != before:
                self._beats[rank], self._heard[rank] = beat, now
                if beat.partition(b" ")[2]:
                    self._busy[rank] = now

    def waited(self) -> float:
        """Seconds since the first look."""
        return time.monotonic() - self._began

    def silent(self, seconds: float) -> list[int]:
        """Ranks that weren't heard of for so long."""
        return [rank for rank, at in self._heard.items() if time.monotonic() - at >= seconds]

    def idle(self, seconds: float) -> list[int]:
        """Ranks that weren't known to be busy for so long."""
        return [rank for rank, at in self._busy.items() if time.monotonic() - at >= seconds]


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """torch 2.13 has new names for these collectives, and 2.11 doesn't know them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _first_words(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0]


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} (and {', '.join(map(str, ranks[1:]))})"


@contextlib.contextmanager
def joined(device: str, *, timeout_s: float) -> Iterator[World | None]:
    """The world of this process where a launcher started several, None where it is alone; left with an error, the
    other ranks are told.

    device  of the recipe: auto, cpu or cuda
    Raises  RunError if the ranks don't meet
    """
    place = launched()
    if place is None or place.size == 1:
        yield None
        return
    if device != "cpu" and torch.cuda.is_available():
        where = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    else:
        where = torch.device("cpu")
    if (fair := max(1, num_cores() // place.local_size)) < torch.get_num_threads():
        torch.set_num_threads(fair)
    with World(place, where, timeout_s) as world:
        yield world
