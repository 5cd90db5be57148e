"""`ossia generate` and `ossia score`: answers to the rows of a file, and log-probabilities of given tokens.

```text
in   {"ids": [...]} or {"messages": [...], "tools": [...]}, also "developer", "reasoning_effort"; other keys are kept
out  generate: the same and "completions": [{"ids", "text", "messages", "logprobs", "finish"}]
     score:    the same and "logprobs", the first one null; with "ids" where the row had none
```
All rows are checked before the first is answered. Results are written in order as they come, into OUT.partial, which
takes its name when all are there: OUT is never half a file, and what was done before an interruption isn't lost.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ossia.data.pack import Pack
from ossia.data.rows import FileRows, Row, index_lines
from ossia.data.sample import Sample
from ossia.disk import why_no_file
from ossia.engine import Completion, Engine, Request, Sampling, harmony_stops
from ossia.errors import DataError, HarmonyError, Interrupted, TokenizerError, UserError
from ossia.harmony import (
    Conversation,
    Renderer,
    StreamParser,
    Vocabulary,
    conversation_from_messages,
    messages_to_openai,
    parse_completion,
)
from ossia.model.open import DeviceChoice, DtypeName, WeightsChoice, open_model
from ossia.model.transformer import Transformer
from ossia.train.schedule import forward_logprobs

_ROWS_AT_ONCE = 1024  # of generate: their prompts and answers are in memory together
_TOKENS_AT_ONCE = 32_768  # of score: they go through the layers together
_TOKENS_PER_PACK = 8192
_SAY_EVERY_S = 10.0


def generate_file(
    model: str,
    source: Path,
    target: Path,
    *,
    adapter: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 1024,
    num_completions: int = 1,
    seed: int = 0,
    dtype: DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
) -> None:
    """Answer every row of `source`; the rows with their "completions" become `target`.

    seed    with the row's number and the completion's, the seed of that completion's own random numbers
    Raises  DataError naming file:line for a row that can't be answered, before anything is generated
    """
    rules = Sampling(temperature, top_p, top_k)  # refused now rather than after the model is loaded
    rows = index_lines(_readable(source), str(source))
    _check_target(target)
    transformer, vocab = open_model(model, adapter=adapter, dtype=dtype, weights=weights, device=device)
    reader = _Reader(rows, vocab, transformer, Renderer(vocab).completion)
    reader.check_all(room=1)
    engine, stops = Engine(transformer), harmony_stops(vocab)

    def requests(number: int, ids: list[int]) -> list[Request]:
        seeds = (seed * 2**64 + number * 2**20 + i for i in range(num_completions))
        samplings = (Sampling(rules.temperature, rules.top_p, rules.top_k, seed=one) for one in seeds)
        return [Request(ids, sampling, max_tokens, stops) for sampling in samplings]

    with _writing(target) as write, _Progress(len(rows), "answered") as progress:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            numbers = range(first, min(first + _ROWS_AT_ONCE, len(rows)))
            prompts = [reader.read(number)[1] for number in numbers]
            batch = [request for n, ids in zip(numbers, prompts, strict=True) for request in requests(n, ids)]
            for place, answers in _in_order(engine, batch, num_completions, progress):
                row, _ = reader.read(numbers[place])
                records = [_record(vocab, prompts[place], answer) for answer in answers]
                write({**row, "completions": records})
                progress.done()


def score_file(
    model: str,
    source: Path,
    target: Path,
    *,
    adapter: str | None = None,
    dtype: DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
) -> None:
    """Score every row of `source`; the rows with their "logprobs" become `target`.

    A conversation is scored as `render_conversation_for_training` renders it. Logits never exist: see `ops/loss.py`.
    Raises  DataError naming file:line for a row that can't be scored, before anything is
    """
    rows = index_lines(_readable(source), str(source))
    _check_target(target)
    transformer, vocab = open_model(model, adapter=adapter, dtype=dtype, weights=weights, device=device)
    reader = _Reader(rows, vocab, transformer, Renderer(vocab).training_ids)
    reader.check_all(room=0)
    with _writing(target) as write, _Progress(len(rows), "scored") as progress:
        for group in _groups(reader):
            for (row, ids), logprobs in zip(group, score(transformer, [ids for _, ids in group]), strict=True):
                write({**row, "ids": ids, "logprobs": logprobs})
                progress.tokens += len(ids)
                progress.done()


def score(model: Transformer, sequences: Sequence[Sequence[int]]) -> list[list[float | None]]:
    """ln p of every token given those before it, float32; None for each sequence's first.

    Raises  UserError if the model's output isn't finite
    """
    packs: list[list[Sample]] = []
    room = 0
    for number, ids in enumerate(sequences):
        if len(ids) > room:
            packs.append([])
            room = _TOKENS_PER_PACK
        weights = np.ones(len(ids), np.float32)
        weights[:1] = 0.0
        packs[-1].append(Sample(np.array(ids, np.int32), weights, None, str(number)))
        room -= len(ids)
    found = forward_logprobs(model, [Pack.from_samples(samples) for samples in packs])
    scored: list[list[float | None]] = []
    for samples, logp_R in zip(packs, found, strict=True):
        flat = logp_R.tolist()
        if not all(map(math.isfinite, flat)):
            raise UserError("the model's output is not finite\n  next: check the checkpoint, the adapter and the dtype")
        for sample in samples:
            scored.append([None, *flat[: len(sample) - 1]])
            flat = flat[len(sample) - 1 :]
    return scored


@dataclass(frozen=True, slots=True)
class _Reader:
    """Rows and their ids; `render` is what makes ids of a conversation."""

    rows: FileRows
    vocab: Vocabulary
    model: Transformer
    render: Callable[[Conversation], list[int]]

    def check_all(self, room: int) -> None:
        """Raise DataError for the first row that can't be used; `room` positions have to be left after its ids."""
        limit = self.model.arch.max_positions - room
        for number in range(len(self.rows)):
            _, ids = self.read(number)
            if len(ids) > limit:
                where = self.rows.where(number)
                raise DataError(f"{where}: {len(ids):,} tokens; this model has room for {limit:,}\n  next: shorten it")

    def read(self, number: int) -> tuple[Row, list[int]]:
        """A row and its ids. Raises DataError with its place."""
        row, where = self.rows.row(number), self.rows.where(number)
        if "ids" in row:  # also where `score` put them beside the messages they came from
            return row, self._checked(row["ids"], where)
        if "messages" not in row:
            raise DataError(f'{where}: expected "ids" or "messages" in the row, found {", ".join(row) or "nothing"}')
        try:
            conversation = conversation_from_messages(
                row["messages"],
                tools=row.get("tools"),
                developer=row.get("developer"),
                reasoning_effort=row.get("reasoning_effort"),
            )
            return row, self.render(conversation)
        except (HarmonyError, TokenizerError) as error:
            raise DataError(f"{where}: {error}") from error

    def _checked(self, ids: Any, where: str) -> list[int]:
        if not isinstance(ids, list) or not ids:
            raise DataError(f"{where}: ids: expected a list with at least one id, found {str(ids)[:40]}")
        limit = self.model.arch.vocab_size
        for place, number in enumerate(ids):
            if type(number) is not int or not 0 <= number < limit:
                raise DataError(
                    f"{where}: ids[{place}]: found {number!r}; allowed: whole numbers from 0 to {limit - 1}"
                )
        return ids


def _in_order(
    engine: Engine, batch: Sequence[Request], each: int, progress: _Progress
) -> Iterator[tuple[int, list[Completion]]]:
    """(row, its `each` completions), row after row, each as soon as it and all before it are there."""
    ids: list[list[int]] = [[] for _ in batch]
    logprobs: list[list[float]] = [[] for _ in batch]
    done: dict[int, Completion] = {}
    row = 0
    for token in engine.stream(batch):
        ids[token.request].append(token.id)
        logprobs[token.request].append(token.logprob)
        progress.tokens += 1
        progress.say()
        if token.finish is None:
            continue
        done[token.request] = Completion(ids[token.request], logprobs[token.request], token.finish)
        while row * each in done and all(row * each + i in done for i in range(each)):
            yield row, [done.pop(row * each + i) for i in range(each)]
            row += 1


def _record(vocab: Vocabulary, prompt: Sequence[int], answer: Completion) -> dict[str, Any]:
    """A completion in the form that DESIGN.md fixes."""
    return {
        "ids": answer.ids,
        "text": vocab.decode(answer.ids),
        "messages": completion_messages(vocab, prompt, answer.ids),
        "logprobs": answer.logprobs,
        "finish": answer.finish,
    }


def completion_messages(vocab: Vocabulary, prompt: Sequence[int], ids: Sequence[int]) -> list[dict[str, Any]]:
    """What was sampled as OpenAI chat messages, from the message on in whose middle the prompt ends.

    Returns  an empty list where the prompt is no Harmony at all, as it has no <|start|>
    """
    start = vocab.special["<|start|>"]
    if start not in prompt:
        return []
    last = len(prompt) - 1 - list(reversed(prompt)).index(start)
    if list(prompt[last + 1 :]) == vocab.encode("assistant"):
        return messages_to_openai(parse_completion(vocab, ids))
    parser = StreamParser(vocab, role=None)
    for number in (*prompt[last:], *ids):
        parser.push(number)
    parser.finish()
    return messages_to_openai(parser.messages)


def _groups(reader: _Reader) -> Iterator[list[tuple[Row, list[int]]]]:
    """Rows with their ids, about _TOKENS_AT_ONCE of them at a time."""
    group: list[tuple[Row, list[int]]] = []
    num_tokens = 0
    for number in range(len(reader.rows)):
        row, ids = reader.read(number)
        if group and num_tokens + len(ids) > _TOKENS_AT_ONCE:
            yield group
            group, num_tokens = [], 0
        group.append((row, ids))
        num_tokens += len(ids)
    yield group


def _readable(source: Path) -> Path:
    if not source.is_file():
        raise DataError(f"{source}: no such file (the current folder is {Path.cwd()})")
    return source


def _check_target(target: Path) -> None:
    if why := why_no_file(target):
        raise DataError(f"{target}: can't be written: {why}\n  next: name a file in a folder that is there")


@contextmanager
def _writing(target: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row; the file takes its name at the end.

    Raises  DataError if it can't be written, Interrupted after Ctrl-C: both say where the rows are that were done
    """
    growing = target.with_name(f"{target.name}.partial")
    rows = 0

    def write(file: TextIO, row: dict[str, Any]) -> None:
        nonlocal rows
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        rows += 1

    try:
        with growing.open("w", encoding="utf-8") as file:
            yield partial(write, file)
        growing.replace(target)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the {rows:,} rows that were done are in {growing}") from None
    except OSError as error:
        done = f"\n  the {rows:,} rows that were done are in {growing}" if rows else ""
        raise DataError(f"{target}: can't be written: {error.strerror}{done}") from error


class _Progress:
    """Rows done, tokens/s and time left on stderr: one changing line, or plain lines where it is no terminal."""

    def __init__(self, rows: int, verb: str) -> None:
        self._rows, self._verb, self._done = rows, verb, 0
        self._begun = self._said = time.monotonic()
        self._live = sys.stderr.isatty()
        self.tokens = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._print("\n")

    def done(self) -> None:
        """One row more is done."""
        self._done += 1
        self.say()

    def say(self) -> None:
        """Show where things stand, if the last time is a while ago."""
        now = time.monotonic()
        if now - self._said >= (0.2 if self._live else _SAY_EVERY_S):
            self._said = now
            self._print("" if self._live else "\n")

    def _print(self, end: str) -> None:
        passed = time.monotonic() - self._begun
        words = f"{self._verb} {self._done:,} of {self._rows:,} rows, {self.tokens / max(passed, 1e-9):,.0f} tokens/s"
        if 0 < self._done < self._rows:
            words += f", {passed / self._done * (self._rows - self._done):,.0f} s left"
        print(f"\r\x1b[K{words}" if self._live else words, end=end, file=sys.stderr, flush=True)
