"""`ossia generate`, `ossia score` and the same from Python, on a model that answers in Harmony."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ossia
from ossia import batch
from ossia.batch import completion_messages, generate_file, score, score_file
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.engine import Engine, Request, Sampling, harmony_stops
from ossia.engine.engine import DecoderChoice
from ossia.errors import DataError, Interrupted, UserError
from ossia.harmony import Renderer, conversation_from_messages
from tests.e2e.conftest import GREETING, ROOT, WEATHER, Command, Talker
from tests.engine.support import decoders
from tests.oracle.model_pairs import held_out

FLOAT32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def model(talker: Talker) -> ossia.api.Model:
    """The talker in this process."""
    return ossia.load(talker.model, adapter=talker.run, dtype="float32")


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_load_and_chat_give_content_thinking_and_calls(model: ossia.api.Model) -> None:
    reply = model.chat(GREETING[:1], temperature=0)
    assert (reply.content, reply.thinking, reply.finish) == ("Hello!", "They greet.\nSo do I.", "stop")
    assert reply.tool_calls == []
    call = model.chat(WEATHER[:1], temperature=0)
    assert call.content == ""
    assert call.tool_calls == [{"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
    assert model.chat([*WEATHER[:1], call.message, result], temperature=0).content == "Sunny."
    assert model.chat([*GREETING[:1], reply.message, *WEATHER[:1]], temperature=0).finish == "stop"


def test_chat_with_a_seed_repeats_itself_and_an_answer_can_be_cut(model: ossia.api.Model) -> None:
    first, second = (model.chat(GREETING[:1], temperature=3.0, max_tokens=9, seed=5).ids for _ in range(2))
    assert first == second != model.chat(GREETING[:1], temperature=3.0, max_tokens=9, seed=6).ids
    cut = model.chat(GREETING[:1], temperature=0, max_tokens=12)
    assert cut.finish == "length"
    assert cut.content == ""
    assert "They greet.\nSo do I.".startswith(cut.thinking)


def test_generate_continues_text_and_ids(model: ossia.api.Model) -> None:
    text, ids = model.generate(["hi", model.vocabulary.encode("hi")], max_tokens=4, sampling=ossia.engine.Sampling(0))
    assert text == ids
    with pytest.raises(UserError, match="empty prompt"):
        model.generate([""])


def test_generate_answers_each_row_and_keeps_the_rest_of_it(talker: Talker, command: Command, tmp_path: Path) -> None:
    prompt = Renderer(ossia.load(talker.model).vocabulary).completion(conversation_from_messages(WEATHER[:1]))
    tools = [{"type": "function", "function": {"name": "look", "description": ""}}]
    given = [
        {"messages": GREETING[:1], "id": "row 1"},
        {"ids": prompt},
        {"messages": GREETING[:1], "tools": tools},
        {"messages": GREETING[:1], "reasoning_effort": "high"},
    ]
    source, target = write_rows(tmp_path / "x.jsonl", *given), tmp_path / "y.jsonl"
    arguments = ("--in", source, "--out", target, "--temperature", 0, "--max-tokens", 80, "--n", 2, *FLOAT32)
    done = command("generate", talker.model, "--adapter", talker.run, *arguments)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "answered 4 of 4 rows" in done.stderr
    found = rows_in(target)
    assert [{key: row[key] for key in row if key != "completions"} for row in found] == given
    assert [len(row["completions"]) for row in found] == [2, 2, 2, 2]
    first = found[0]["completions"][0]
    assert set(first) == {"ids", "text", "messages", "logprobs", "finish"}
    assert first["messages"] == [
        {"role": "assistant", "content": "Hello!", "reasoning_content": "They greet.\nSo do I."}
    ]
    assert first["text"].endswith("<|channel|>final<|message|>Hello!<|return|>")
    assert (first["finish"], len(first["ids"])) == ("stop", len(first["logprobs"]))
    assert found[1]["completions"][0]["messages"][0]["tool_calls"][0]["function"]["name"] == "look"
    asked_differently = [row["completions"][0]["logprobs"][0] for row in (found[0], found[2], found[3])]
    assert len(set(asked_differently)) == 3  # tools and effort reach the prompt
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl"]  # nothing partial is left


def test_completions_differ_from_each_other_and_repeat_with_the_seed(talker: Talker, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", *[{"messages": GREETING[:1]}] * 2)

    def completions(seed: int) -> list[list[int]]:
        generate_file(
            str(talker.model), source, tmp_path / "y", temperature=2.0, max_tokens=6, num_completions=2, seed=seed
        )
        return [one["ids"] for row in rows_in(tmp_path / "y") for one in row["completions"]]

    found = completions(0)
    assert len(set(map(tuple, found))) == 4
    assert completions(0) == found != completions(1)


def test_scores_are_the_logprobs_that_generating_gave(talker: Talker, command: Command, tmp_path: Path) -> None:
    model = ossia.load(talker.model, adapter=talker.run, dtype="float32")
    prompt = Renderer(model.vocabulary).completion(conversation_from_messages(GREETING[:1]))
    sampled = model.generate([prompt] * 3, max_tokens=70, sampling=ossia.engine.Sampling(1.5, seed=3))
    source = write_rows(tmp_path / "x.jsonl", *({"ids": prompt + one.ids} for one in sampled), {"ids": [5]})
    target = tmp_path / "y.jsonl"
    done = command("score", talker.model, "--adapter", talker.run, "--in", source, "--out", target, *FLOAT32)
    assert done.returncode == 0, done.stderr
    *found, single = rows_in(target)
    assert single["logprobs"] == [None]
    for row, one in zip(found, sampled, strict=True):
        assert row["logprobs"][0] is None
        assert row["logprobs"][len(prompt) :] == pytest.approx(one.logprobs, rel=1e-5, abs=1e-5)


def test_a_conversation_is_scored_as_it_is_trained(talker: Talker, model: ossia.api.Model, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "x.jsonl", {"messages": GREETING}), tmp_path / "y.jsonl"
    score_file(str(talker.model), source, target, adapter=str(talker.run), dtype="float32")
    (row,) = rows_in(target)
    assert row["ids"] == Renderer(model.vocabulary).training_ids(conversation_from_messages(GREETING))
    sample = Sample(np.array(row["ids"], np.int32), np.zeros(len(row["ids"]), np.float32), None, "row")
    logits = model.transformer.logits(Pack.from_samples([sample])).float().log_softmax(-1)
    expected = [float(logits[t, number]) for t, number in enumerate(row["ids"][1:])]
    assert row["logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    score_file(str(talker.model), target, tmp_path / "z.jsonl", adapter=str(talker.run), dtype="float32")
    assert rows_in(tmp_path / "z.jsonl") == [row]  # its own output can be scored again


def test_many_sequences_are_scored_in_their_order_across_packs(model: ossia.api.Model) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 250, length).tolist() for length in (1, 5000, 7, 1, 5000, 30)]
    together = score(model.transformer, sequences)
    for number in (0, 2, 3, 5):
        alone = score(model.transformer, [sequences[number]])[0]
        assert alone[0] is together[number][0] is None
        assert together[number][1:] == pytest.approx(alone[1:], abs=1e-5)


@pytest.mark.parametrize("decoder", decoders())
def test_sampling_in_bf16_agrees_with_the_training_forward(trained: Path, decoder: DecoderChoice) -> None:
    """Mean KL, estimated from the sampled tokens: r - 1 - ln r with r = p_train / p_sample.

    Of a trained model: a random one's router flips under rounding, and one flip outweighs a thousand tokens. It flips
    now and then here too, so that a mean over thousands of tokens is still uncertain by some 20%.
    """
    model = ossia.load(trained)
    prompts = [sample.ids[: int(np.flatnonzero(sample.weights)[0])].tolist() for sample in held_out(trained, 40)] * 3
    requests = [Request(ids, Sampling(seed=i), 60, harmony_stops(model.vocabulary)) for i, ids in enumerate(prompts)]
    sampled = Engine(model.transformer, decoder=decoder).generate(requests)
    scored = score(model.transformer, [ids + one.ids for ids, one in zip(prompts, sampled, strict=True)])
    ours = np.concatenate([one.logprobs for one in sampled])
    theirs = np.concatenate([row[len(ids) :] for ids, row in zip(prompts, scored, strict=True)]).astype(float)
    assert len(ours) >= 3000
    kl = np.exp(theirs - ours) - 1 - (theirs - ours)
    assert kl.mean() - 2 * kl.std() / np.sqrt(len(kl)) <= 3e-4, kl.mean()
    assert np.median(kl) <= 5e-5


BAD_ROWS = {
    '{"messages": [{"role": "user", "content": "a"}': "not valid JSON",
    '{"prompt": "x"}': 'expected "ids" or "messages"',
    '{"ids": []}': "at least one id",
    '{"ids": [1, 99999]}': r"ids\[1\]: found 99999",
    '{"ids": [1, true]}': r"ids\[1\]: found True",
    '{"messages": [{"role": "usr", "content": "a"}]}': r"messages\[0\].role",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("run", [generate_file, score_file])
def test_a_bad_row_is_told_with_its_line_before_anything_is_done(
    talker: Talker, tmp_path: Path, run: Any, bad: str
) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"ids": [1]}\n\n' + bad + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:3: .*{BAD_ROWS[bad]}"):
        run(str(talker.model), source, tmp_path / "y.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_cannot_be_read_or_written_is_a_message(talker: Talker, command: Command, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", {"ids": [1]})
    for given, wanted, words in (
        (tmp_path / "none.jsonl", tmp_path / "y.jsonl", "no such file"),
        (source, tmp_path / "no" / "y.jsonl", "can't be written"),
    ):
        done = command("score", talker.model, "--in", given, "--out", wanted)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("work", [generate_file, score_file])
def test_where_results_cannot_go_is_told_before_a_model_is_opened(
    work: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "x.jsonl", {"ids": [1]})
    monkeypatch.setattr(batch, "open_model", None)
    for target, words in (
        (Path("."), r"^\.: can't be written: it is a folder\n  next: name a file"),
        (tmp_path / "none" / "y.jsonl", "can't be written: there is no folder .*none"),
        (source / "y.jsonl", "can't be written: there is no folder .*x.jsonl"),
        (Path("/dev/null"), "can't be written: it is no regular file"),
        (Path("/proc/y.jsonl"), "can't be written: No such file or directory"),
    ):
        with pytest.raises(DataError, match=words):
            work("model", source, target)
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_an_interruption_keeps_the_rows_that_were_done(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "x.jsonl", {"ids": [1]}, {"ids": [2]}, {"ids": [3]})
    target = write_rows(tmp_path / "y.jsonl", {"old": 1})
    done = []

    def interrupt(*_: object) -> list[dict[str, Any]]:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr("ossia.batch.completion_messages", interrupt)
    with pytest.raises(Interrupted, match=r"the 2 rows that were done are in .*y\.jsonl\.partial"):
        generate_file(str(talker.model), source, target, max_tokens=2)
    assert len(rows_in(tmp_path / "y.jsonl.partial")) == 2
    assert rows_in(target) == [{"old": 1}]


def test_a_prompt_that_ends_inside_a_message_is_parsed_from_its_start(model: ossia.api.Model) -> None:
    vocab = model.vocabulary
    special, text = vocab.special, vocab.encode
    prompt = [special["<|start|>"], *text("assistant"), special["<|channel|>"], *text("final"), special["<|message|>"]]
    prompt += text("Hel")
    ids = [*text("lo!"), special["<|return|>"]]
    assert completion_messages(vocab, prompt, ids) == [{"role": "assistant", "content": "Hello!"}]
    assert completion_messages(vocab, text("plain"), ids) == []


@pytest.mark.parametrize("first", ["import ossia.train.step", "ossia.load", "ossia.train", "from ossia import train"])
def test_train_can_be_called_whatever_was_imported_before(first: str) -> None:
    """The function and the folder share a name."""
    code = f"import ossia; {first}; import ossia.train.loop; ossia.train.loop.run_loop; ossia.train('none.yaml')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "RecipeError: none.yaml: no such recipe" in done.stderr
