"""The `ossia demo` story: an untrained checkpoint in the released format, data, a recipe, training, and what it learnt.

It takes the way that a user's own run takes: files on disk, a recipe in YAML, `sft.run`, batch generation. Every
figure it prints was measured in the run it prints it of. The folder afterwards:

    data/       train, heldout and questions .jsonl       start/     the untrained checkpoint, MXFP4 experts
    demo.yaml   the recipe                                answers/   what the model answered, before and after
    and what every `ossia train` leaves: events.jsonl, checkpoints/, model/, report.html
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossia import sft
from ossia.batch import generate_file
from ossia.config import check_recipe, load_recipe
from ossia.config.check import RECIPE_IN_RUN
from ossia.demo.prepare import DATA, RECIPE, START, Plan, prepare, recipe_text
from ossia.disk import why_no_folder
from ossia.errors import UserError
from ossia.model.checkpoint import Checkpoint
from ossia.run.trained import MODEL
from ossia.train.events import EVENTS, Sink, read_events
from ossia.train.report import write_report

ANSWERS = "answers"
MAX_ANSWER_TOKENS = 80  # a right answer has 54


@dataclass(frozen=True, slots=True)
class Score:
    """Held-out loss in nats per trained token, and the share of held-out questions answered exactly."""

    loss: float
    exact_match: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Where everything is, and what was measured before and after training."""

    folder: Path
    model: Path
    before: Score
    after: Score


def run_demo(folder: Path, *, seed: int = 0, plan: Plan | None = None, sink: Sink | None = None) -> DemoResult:
    """Tell the whole story in `folder`; the story goes to stdout, progress to stderr.

    An earlier demo there stays as it is until this one is done: this one is made beside it and then takes its place.
    sink    hears the training's events instead of the terminal
    Raises  UserError if `folder` holds something else than an earlier demo; what `sft.run` raises
    """
    started, plan = time.monotonic(), plan or Plan()
    place = _make_room(folder)
    before, after = _tell(place, seed=seed, plan=plan, sink=sink)
    if place != folder:
        _take_place(place, folder, seed=seed, plan=plan)
    print(f"\nThe report: {folder / 'report.html'}\nTalk to it: ossia chat {folder / MODEL}")
    print(f"All of this took {time.monotonic() - started:.0f} s.")
    return DemoResult(folder, folder / MODEL, before, after)


def _tell(folder: Path, *, seed: int, plan: Plan, sink: Sink | None) -> tuple[Score, Score]:
    """The story in an empty folder; the scores before and after training."""
    print(f"1. Data and an untrained gpt-oss model, from seed {seed}")
    files, recipe_file = prepare(folder, seed=seed, plan=plan)
    trained_on, held_out, asked = map(_num_lines, (files.train, files.heldout, files.questions))
    print(f"   {folder / DATA}: {trained_on:,} conversations to train on, {held_out:,} held out, {asked:,} questions")
    print(f"   {folder / START}: {_describe(folder / START)}")

    print("\n2. Before training")
    (folder / ANSWERS).mkdir()
    before = _answer(folder / START, files.questions, folder / ANSWERS / "before.jsonl")
    _show_turn(before[0])

    print(f"\n3. Fine-tuning: ossia train {recipe_file}", flush=True)
    recipe = load_recipe(recipe_file)
    check_recipe(recipe)
    trained = sft.run(recipe, sink=sink).trained
    losses = [event["eval_loss"] for event in read_events(folder / EVENTS) if event["event"] == "eval"]

    print("\n4. After training, the same question")
    after = _answer(trained, files.questions, folder / ANSWERS / "after.jsonl")
    _show_turn(after[0])
    scores = Score(losses[0], exact_match(before)), Score(losses[-1], exact_match(after))
    _show_scores(*scores, num_questions=asked)
    return scores


def exact_match(answered: list[dict[str, Any]]) -> float:
    """Share of rows whose completion ends in a final message that is exactly the row's `answer`."""
    right = [_final_text(row["completions"][0]["messages"]) == row["answer"] for row in answered]
    return sum(right) / len(right)


def _final_text(messages: list[dict[str, Any]]) -> str | None:
    """The text of the last final message; None if there is none."""
    return next((m["content"] for m in reversed(messages) if m.get("content") and "channel" not in m), None)


def _make_room(folder: Path) -> Path:
    """The empty folder to make a demo in: `folder`, or one beside it where an earlier demo is to stay until then.

    What an unfinished demo left is removed; anything else is left alone and refused.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: the current folder or one around it; name another folder with --output")
    place = folder
    if (folder / RECIPE).is_file() and (folder / MODEL).is_dir():
        place = folder.with_name(f"{folder.name}.new")
        print(f"{folder} holds an earlier demo, which stays as it is until this one is done. It is made in {place}")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        if not (place / RECIPE).is_file():
            raise UserError(f"{place}: holds something else than a demo; name another folder with --output")
        print(f"{place}: an unfinished demo; begun anew")
        shutil.rmtree(place)
    if why := why_no_folder(place):
        raise UserError(f"{place}: can't be made: {why}; name another folder with --output")
    place.mkdir(parents=True, exist_ok=True)
    return place


def _take_place(place: Path, folder: Path, *, seed: int, plan: Plan) -> None:
    """Put a finished demo where an earlier one is, and remove that; what names the folder is written again."""
    before = place / ".before"  # so that both are in one folder, should this end between the two renames
    folder.rename(before)
    place.rename(folder)
    (folder / RECIPE).write_text(recipe_text(folder, seed=seed, plan=plan), encoding="utf-8")
    (folder / RECIPE_IN_RUN).write_text(load_recipe(folder / RECIPE).to_yaml(), encoding="utf-8")
    write_report(folder)
    shutil.rmtree(folder / before.name)
    print(f"\n{folder} is this one now; the earlier one is gone.", end="")


def _answer(model: Path, questions: Path, target: Path) -> list[dict[str, Any]]:
    """Greedy answers to every question, through the same code as `ossia generate`; the rows with completions."""
    generate_file(
        str(model),
        questions,
        target,
        adapter=None,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        max_tokens=MAX_ANSWER_TOKENS,
        num_completions=1,
        seed=0,
        dtype="float32",
        weights="bf16",
        device="auto",
    )
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def _describe(model: Path) -> str:
    """The untrained checkpoint in words, read back from its files."""
    checkpoint = Checkpoint.open(model)
    arch, size = checkpoint.arch, f"{checkpoint.num_bytes / 1e6:.1f} MB"
    experts = f"{arch.num_experts} experts, {arch.experts_per_token} a token"
    weights = f"{arch.num_parameters() / 1e6:.1f} million random weights"
    return f"{weights}, {arch.num_layers} layers, {experts}, {checkpoint.layout} layout, {size}"


def _show_turn(row: dict[str, Any]) -> None:
    """One question and what the model made of it, thinking apart from the answer."""
    print(f"   user      {row['messages'][-1]['content']}")
    for message in row["completions"][0]["messages"]:
        for key, label in (("reasoning_content", "analysis"), ("content", "answer")):
            if message.get(key):
                print(f"   {label:<9} {_shortened(message[key])}")
    print(f"   expected  {row['answer']}")


def _shortened(text: str) -> str:
    """Text on one line; what is over 100 characters is cut with a mark."""
    line = repr(text)[1:-1]
    return line if len(line) <= 100 else f"{line[:100]} ..."


def _show_scores(before: Score, after: Score, *, num_questions: int) -> None:
    print(f"\n   {'':<34}{'before':>8}{'after':>8}")
    print(f"   {'held-out loss (nats a token)':<34}{before.loss:>8.3f}{after.loss:>8.3f}")
    label = f"exact match, {num_questions} held-out questions"
    print(f"   {label:<34}{before.exact_match:>8.2f}{after.exact_match:>8.2f}")


def _num_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())
