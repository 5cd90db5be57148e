"""Every example runs as its docstring says, on a tiny model, and what it prints is true of that model."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ossia
from ossia.model.arch import SHAPES
from tests.conftest import MakeTiny

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARCH = dataclasses.replace(
    SHAPES["demo"], hidden_size=64, num_layers=2, layer_types=SHAPES["demo"].layer_types[:2], num_experts=8
)
PAIRS = [("7 up", "8", "One more."), ("3 up", "4", ""), ("a, b", "c", "")]


def run(name: str, *arguments: str | Path, folder: Path) -> str:
    """What the example prints, run in `folder` as a person runs it; its errors are the test's."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool_conversation() -> dict:
    """What examples/tools.py says to a model about 12 times 7, with the model's part."""
    source = (ROOT / "examples" / "tools.py").read_text(encoding="utf-8")
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            exec(compile(ast.Module([node], []), "tools.py", "exec"), values)
    (developer,) = re.findall(r'developer="(.*)"', source)
    call = {"id": "call_1", "function": {"name": "multiply", "arguments": '{"a": 12, "b": 7}'}}
    return {
        "tools": [{"type": "function", "function": values["MULTIPLY"]}],
        "developer": developer,
        "reasoning_effort": "low",
        "messages": [
            {"role": "user", "content": "What is 12 times 7?"},
            {"role": "assistant", "thinking": "I call it.", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"result": 84}'},
            {"role": "assistant", "content": "It is 84."},
        ],
    }


@pytest.fixture(scope="module")
def model(tiny: MakeTiny) -> Path:
    """A tiny random model."""
    return tiny(ARCH)


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the tool conversation and two answers by heart; rows.jsonl is beside it."""
    folder = tmp_path_factory.mktemp("taught")
    texts = [("up", "8"), ("down", "4")]
    chats = [[{"role": "user", "content": ask}, {"role": "assistant", "content": text}] for ask, text in texts]
    rows = [tool_conversation(), *({"messages": messages} for messages in chats)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"path": str(folder / "rows.jsonl")}
    recipe = {
        "model": str(model),
        "dtype": "float32",
        "adapter": {"rank": 8, "targets": ["attention", "experts", "lm_head"]},
        "data": data,
        "eval": {"data": data, "answers": 0},
        "max_length": 640,
        "train": {"steps": 60, "tokens_per_step": 640, "learning_rate": 1e-2, "warmup": 3, "save_every": 0},
        "output": str(folder / "run"),
    }
    return ossia.train(recipe).folder


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short_and_says_what_it_shows_and_how_to_run_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"Run: python examples/{file.name}" in (ast.get_docstring(ast.parse(text)) or "")
    assert re.search(rf'\brun\(\s*"{file.stem}"', Path(__file__).read_text(encoding="utf-8")), "no test runs it"


def test_a_csv_file_becomes_rows_a_recipe_and_a_trained_adapter(model: Path, tmp_path: Path) -> None:
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer", "thinking"), *PAIRS])
    said = run("fine_tune", model, "pairs.csv", "run", "--steps", 6, folder=tmp_path)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(row[0]["content"], row[1]["content"], row[1].get("thinking", "")) for row in rows] == PAIRS
    trained = [int(number) for number in re.findall(r"pairs.jsonl:\d: \d+ tokens, (\d+) of them trained", said)]
    assert len(trained) == 3
    assert trained[0] > trained[1] > 0, "the first has thinking as well"
    assert re.search(r"^7 up -> ", said, flags=re.MULTILINE)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_model_calls_a_tool_hears_its_result_and_answers(model: Path, taught: Path, tmp_path: Path) -> None:
    said = run(
        "tools", model, "What is 12 times 7?", "--adapter", taught, "--temperature", 0, folder=tmp_path
    ).splitlines()
    assert said == [
        "thinking  I call it.",
        'call      multiply({"a": 12, "b": 7}) -> {"result": 84}',
        "answer    It is 84.",
    ]


def test_perplexity_is_that_of_the_runs_own_held_out_loss(taught: Path, tmp_path: Path) -> None:
    said = run("perplexity", taught / "recipe.yaml", "output=other", "--adapter", taught, folder=tmp_path)
    events = [json.loads(line) for line in (taught / "events.jsonl").read_text().splitlines()]
    measured = [event["eval_loss"] for event in events if event["event"] == "eval"][-1]
    found = {name.strip(): float(nats) for name, nats in re.findall(r"^(.+?) +([\d.]+) nats", said, re.MULTILINE)}
    assert set(found) == {"analysis", "commentary", "final", "all"}
    assert found["all"] == pytest.approx(measured, abs=1e-4)
    assert "0 stops in the middle" in said


def test_perplexity_counts_the_stops_that_it_leaves_out(taught: Path, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "up"}, {"role": "assistant", "content": "8"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": turn * 3}) + "\n")
    said = run("perplexity", taught / "recipe.yaml", "output=other", "data=turns.jsonl", folder=tmp_path)
    (counted,) = re.findall(r"^all .* (\d+) tokens$", said, re.MULTILINE)
    assert "2 stops in the middle" in said
    assert (int(counted) + 2) % 3 == 0, "each turn has as many as the others"


def test_only_an_answer_that_is_exactly_right_is_counted(model: Path, taught: Path, tmp_path: Path) -> None:
    asked = [("up", "8"), ("down", "4"), ("down", "4 ")]
    rows = [{"messages": [{"role": "user", "content": ask}], "answer": answer} for ask, answer in asked]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run("exact_match", model, "q.jsonl", "--adapter", taught, "--dtype", "float32", folder=tmp_path)
    assert "exact match: 0.67 of 3 rows" in said
    assert "expected '4 '\n  found    '4'" in said


def test_an_export_answers_in_transformers_as_it_does_here(taught: Path, tmp_path: Path) -> None:
    said = run("to_transformers", taught, "exported", "--question", "down", folder=tmp_path).splitlines()
    theirs, ours, verdict = said[-3:]
    assert theirs.removeprefix("transformers").strip() == ours.removeprefix("ossia").strip()
    assert theirs.endswith("<|channel|>final<|message|>4<|return|>")
    assert verdict == "the same"


def test_curves_shows_what_the_events_say_while_a_run_goes_on(taught: Path, tmp_path: Path) -> None:
    whole = (taught / "events.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_bytes(whole + b'{"event": "st')
    said = run("curves", tmp_path, "--csv", tmp_path / "losses.csv", "--width", 20, folder=tmp_path)
    events = [json.loads(line) for line in whole.splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    first, *_, last = [event["eval_loss"] for event in events if event["event"] == "eval"] * 2
    assert f"{losses[0]:.3f} -> {losses[-1]:.3f}" in said
    assert f"{last:.3f} at step 60" in said
    assert first >= last
    with (tmp_path / "losses.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses
    curve = said.splitlines()[0].split()[1]
    assert len(curve) <= 20
    assert curve[0] == "█"
