"""A run with `qat: mxfp4` from the recipe on: what it evaluates is what it leaves, and it goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ossia import evaluate, sft
from ossia.config import Recipe, check_recipe, recipe_from_dict
from ossia.data.dataset import in_order, open_datasets
from ossia.errors import UserError
from ossia.export import export_model
from ossia.model.checkpoint import Checkpoint
from ossia.model.open import open_model
from ossia.run.samples import questions_of, record_samples
from tests.conftest import MakeTiny
from tests.shapes import LEAST

EXPERTS = {"rank": 4, "targets": ["experts"]}


def recipe(model: Path, folder: Path, name: str = "run", **keys: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        chats = [
            [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}] for n in range(24)
        ]
        rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    given = {
        "model": str(model),
        "dtype": "float32",
        "data": {"path": str(rows)},
        "adapter": EXPERTS,
        "qat": "mxfp4",
        "eval": {"split": 0.25, "every": 2, "answers": 1, "answer_tokens": 8},
        "max_length": 256,
        "train": {"steps": 4, "tokens_per_step": 512, "tokens_per_pack": 256, "learning_rate": 0.02, "save_every": 2},
        "output": str(folder / name),
    }
    return recipe_from_dict({**given, **keys})


def last_event(run: Path, kind: str) -> dict[str, Any]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind][-1]


@pytest.mark.parametrize("weights", ["mmap", "bf16"])
def test_held_out_loss_and_answers_of_a_run_are_those_of_its_mxfp4_export(
    tiny: MakeTiny, tmp_path: Path, weights: str
) -> None:
    given = recipe(tiny(LEAST), tmp_path, weights=weights)
    run = sft.run(given).folder
    out = export_model(str(run), to="hf-mxfp4", output=tmp_path / "out")
    found = last_event(run, "eval")["eval_loss"]
    assert found == pytest.approx(loss_of(tmp_path, out), rel=1e-6)
    assert found == pytest.approx(evaluate.run(given, adapter=str(run / "adapter")).loss, rel=1e-6), (
        "the recipe says it"
    )
    assert found == pytest.approx(loss_of(tmp_path, tiny(LEAST), adapter=str(run)), rel=1e-6), "of the run"
    unrounded = loss_of(tmp_path, tiny(LEAST), adapter=str(run / "adapter"))
    assert abs(unrounded / found - 1) > 1e-5, "rounding changes nothing: the test would show nothing"
    answer = (run / "samples.jsonl").read_text().splitlines()[-1]
    model, vocab = open_model(str(out), dtype="float32")
    held_out = list(in_order(open_datasets(given, vocab).held_out))
    record_samples(tmp_path / "again.jsonl", model, vocab, questions_of(held_out, 1), step=4, max_tokens=8)
    assert answer == (tmp_path / "again.jsonl").read_text().strip()


def loss_of(folder: Path, model: Path, *, adapter: str | None = None) -> float:
    return evaluate.run(recipe(model, folder, "other", qat=None, adapter=None), adapter=adapter).loss


@pytest.mark.parametrize("weights", ["resident", "bf16"])
def test_a_run_that_trains_all_weights_leaves_them_in_mxfp4(tiny: MakeTiny, tmp_path: Path, weights: str) -> None:
    run = sft.run(recipe(tiny(LEAST), tmp_path, adapter=None, weights=weights)).folder
    assert Checkpoint.open(run / "model").layout == "mxfp4"
    out = export_model(str(run), to="hf-mxfp4", output=tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    # what isn't an expert was rounded to bfloat16
    assert last_event(run, "eval")["eval_loss"] == pytest.approx(loss_of(tmp_path, out), rel=1e-3)


def test_a_run_goes_on_with_the_qat_it_began_with(tiny: MakeTiny, tmp_path: Path) -> None:
    sft.run(recipe(tiny(LEAST), tmp_path))
    with pytest.raises(UserError, match="qat: mxfp4 there, null here"):
        check_recipe(recipe(tiny(LEAST), tmp_path, qat=None), resume=True)


def test_it_learns_through_the_rounding(tiny: MakeTiny, tmp_path: Path) -> None:
    long = {"steps": 30, "tokens_per_step": 512, "tokens_per_pack": 256, "learning_rate": 0.02}
    run = sft.run(recipe(tiny(LEAST), tmp_path, train=long)).folder
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [event["eval_loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < losses[0] - 0.5, losses
