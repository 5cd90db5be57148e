"""Other programs load what `ossia export` wrote as it is, and compute what Ossia computes, each in its own process.

Compared in float32 on a trained model: every logit of held-out texts, and greedy answers token for token. llama.cpp and
MLX round YaRN's range outwards whatever the config says, so beside them Ossia does too (`truncate`).
`python -m benchmarks.clients` asks these and the clients that take minutes to install or start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.clients.chats import clients_chats, openings, well_formed
from benchmarks.clients.compare import Difference, Questions, clients_answers, ossias_answers, ossias_model
from benchmarks.clients.exports import Exports
from benchmarks.clients.llama import EXACT, llamas_answers
from benchmarks.clients.venvs import transformers_457
from ossia.demo.conversations import read_rows
from ossia.demo.prepare import DATA
from ossia.export import export_model
from ossia.harmony import Vocabulary
from ossia.web.gguf import start_llama

TOLERANCE = 1e-3  # of a logit; found: 1e-5, and a router that goes elsewhere moves logits by 0.1 to 2


def assert_same(
    worker: str,
    model: Path,
    asked: Questions,
    *,
    adapter: Path | None = None,
    truncate: bool = False,
    site: Path | None = None,
    version: tuple[str, str],
) -> None:
    expected = ossias_answers(ossias_model(model, adapter=adapter, truncate=truncate), asked)
    answers = clients_answers(worker, model, asked, adapter=adapter, path=site)
    found = Difference.between(answers, expected)
    assert answers.versions[version[0]] == version[1]
    assert found.max_abs <= TOLERANCE, found
    assert (found.top1, found.same) == (1.0, found.prompts), found


def test_transformers_523_answers_as_the_merged_folder_does(exports: Exports, asked: Questions) -> None:
    assert_same("transformers_.py", exports.merged, asked, version=("transformers", "5.23.0"))


def test_transformers_457_answers_as_the_merged_folder_does(exports: Exports, asked: Questions) -> None:
    site = transformers_457()
    assert_same("transformers_.py", exports.merged, asked, site=site, version=("transformers", "4.57.6"))


def test_peft_answers_as_the_mxfp4_model_with_its_adapter_does(exports: Exports, asked: Questions) -> None:
    version = ("peft", "0.21.2")
    assert_same("peft_.py", exports.base, asked, adapter=exports.adapter, version=version)


def test_onnx_runtime_genai_builds_from_the_merged_folder_and_answers_as_it_does(
    exports: Exports, asked: Questions
) -> None:
    assert_same("onnx_genai.py", exports.merged, asked, version=("onnxruntime-genai", "0.18.0"))


def test_mlx_answers_as_the_merged_mxfp4_folder_does(exports: Exports, asked: Questions) -> None:
    assert_same("mlx_lm_.py", exports.merged_mxfp4, asked, truncate=True, version=("mlx-lm", "0.32.2"))


def test_llama_cpp_answers_as_the_merged_model_does(exports: Exports, asked: Questions) -> None:
    prompts = replace(asked, texts=[])
    expected = ossias_answers(ossias_model(exports.merged, truncate=True), prompts)
    assert llamas_answers(exports.merged_gguf, prompts).answers == expected.answers


def test_llama_cpp_answers_with_the_adapters_file_as_the_adapted_model_does(exports: Exports, asked: Questions) -> None:
    prompts = replace(asked, texts=[])
    adapted = ossias_model(exports.base_bf16, adapter=exports.adapter, truncate=True)
    answers = llamas_answers(exports.exact_gguf, prompts, lora=exports.adapter_gguf)
    assert answers.answers == ossias_answers(adapted, prompts).answers


def test_the_gguf_file_comes_back_as_the_merged_folder(exports: Exports, tmp_path: Path) -> None:
    folder = export_model(str(exports.merged_gguf), to="hf-bf16", output=tmp_path / "back")
    for file in exports.merged.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_llama_cpp_chats_and_calls_tools_as_the_merged_model_does(exports: Exports, trained: Path) -> None:
    data = trained.parent / DATA
    rows = openings([row for file in ("heldout", "questions") for row in read_rows(data / f"{file}.jsonl")], each=40)
    model, vocab = ossias_model(exports.merged, truncate=True), Vocabulary.from_file(exports.merged)
    kept, expected = zip(*well_formed(model, vocab, rows, max_tokens=100), strict=True)
    server = start_llama(exports.merged_gguf, EXACT)
    found = clients_chats(server.listening_address, kept, max_tokens=100, thinking="reasoning_content")
    assert found == [*expected]
    assert len(found) >= 10
    assert sum(bool(said.calls) for said in found) >= 2, "hardly a tool was called: this shows nothing of calls"


def test_the_adapter_says_something_else_than_its_base(exports: Exports, asked: Questions) -> None:
    """Or a client that leaves it out would pass."""
    base, merged = (
        ossias_answers(ossias_model(path, truncate=False), asked) for path in (exports.base, exports.merged)
    )
    found = Difference.between(base, merged)
    assert found.max_abs > 1
    assert found.same < found.prompts / 2
