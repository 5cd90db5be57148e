"""GGUF files in llama.cpp, started by the test: the same answers as ours, and what `ossia serve` and `chat` make of it.

llama.cpp rounds YaRN's range outwards, so where numbers are compared our model does too (`truncate: true`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from openai import OpenAI
from typer.testing import CliRunner

from ossia.cli import app, main
from ossia.engine import Engine, Request, Sampling
from ossia.errors import CheckpointError, MissingExtraError, UserError
from ossia.export import export_model
from ossia.model.open import open_model
from ossia.web.gguf import LlamaOptions, checked_gguf, run_gguf_chat, run_gguf_server, start_llama
from tests.conftest import MakeTiny
from tests.e2e.conftest import ROOT
from tests.shapes import SHALLOW
from tests.web.conftest import GREET, WEATHER, WEATHER_TOOL, Talker
from tests.web.test_signals import Process

ROUNDED = dataclasses.replace(SHALLOW, rope_truncate=True, sliding_window=16)
SMALL = LlamaOptions(threads=1, ctx_size=512, parallel=1)
EXACT = dataclasses.replace(SMALL, cache_type_k="f32", cache_type_v="f32")
NUM_TOKENS = 12


def next_token(server: Any, ids: list[int]) -> tuple[int, float | None]:
    """llama.cpp's likeliest token and its log-probability, which it doesn't say of half a character."""
    body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 1, "ignore_eos": True, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.loads(answer.read())
    said = found.get("completion_probabilities")
    return found["tokens"][0], said[0]["logprob"] if said else None


def pairs_of(model: Path, file: Path) -> list[tuple[tuple[int, float | None], tuple[int, float]]]:
    """Of every position of our greedy answers: llama.cpp's choice there and ours."""
    transformer, _ = open_model(str(model), dtype="float32", weights="bf16", device="cpu")
    generator, pairs = torch.Generator().manual_seed(3), []
    server = start_llama(file, EXACT)
    for length in (3, 15, 16, 17, 40, 70):  # some shorter and some longer than the window
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        (ours,) = Engine(transformer).generate([Request(ids, Sampling(0), NUM_TOKENS)])
        for number, logprob in zip(ours.ids, ours.logprobs, strict=True):
            pairs.append((next_token(server, ids), (number, logprob)))
            ids.append(number)
    return pairs


def test_llama_cpp_computes_what_we_compute(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(ROUNDED, "bf16")
    export_model(str(model), to="gguf", output=tmp_path / "x.gguf", gguf_type="f32")
    pairs = pairs_of(model, tmp_path / "x.gguf")
    # a random model's likeliest tokens are near each other, and llama.cpp's own sums differ by up to 2e-3 in a logprob
    same = [(found[1], wanted[1]) for found, wanted in pairs if found[0] == wanted[0]]
    assert len(same) >= 0.95 * len(pairs)
    told = [(found, wanted) for found, wanted in same if found is not None]
    assert len(told) > len(pairs) / 3
    assert max(abs(found - wanted) for found, wanted in told) <= 1e-2


def test_llama_cpp_reads_mxfp4_experts_as_we_do(tiny: MakeTiny, tmp_path: Path) -> None:
    """Up to the eight bits that it rounds activations to: far less than any wrong nibble, scale or order would do."""
    model = tiny(ROUNDED)
    export_model(str(model), to="gguf", output=tmp_path / "x.gguf", gguf_type="f32")
    pairs = pairs_of(model, tmp_path / "x.gguf")
    assert sum(found[0] == wanted[0] for found, wanted in pairs) >= 0.9 * len(pairs)
    off = [abs(found[1] - wanted[1]) for found, wanted in pairs if found[0] == wanted[0] and found[1] is not None]
    assert median(off) < 0.05, off


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def talking(talker: Talker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talker, merged, as a GGUF file."""
    return export_model(str(talker.run), to="gguf", output=tmp_path_factory.mktemp("gguf") / "talker.gguf")


def test_chat_with_a_gguf_file_in_a_pipe_answers_as_the_trained_model(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\ncount\n"))
    run_gguf_chat(str(talking), SMALL, settings={"temperature": 0, "max_tokens": 100})
    found = capsys.readouterr()
    assert found.out == "Hello!\none, two, three, four\n"
    assert "[thinking]\n| They greet.\n| So do I.\n" in found.err


def test_the_chat_command_passes_its_options_on(talking: Path) -> None:
    words = ["chat", str(talking), "--temperature", "0", "--max-tokens", "60", "-t", "1", "-c", "512"]
    done = CliRunner().invoke(app, [*words, "-ot", "ffn_.*_exps=CPU", "-ngl", "0", "-ctk", "f32"], input="hi\n")
    assert (done.exit_code, done.stdout) == (0, "Hello!\n"), done.stderr


def test_serve_answers_the_openai_client_until_a_signal(talking: Path) -> None:
    options = ("--api-key", "sesame", "-t", "1", "-c", "1024", "-np", "2", "-ctk", "bf16")
    process = Process(talking, options=options)
    try:
        assert "through llama.cpp" in process.text
        client = OpenAI(base_url=f"{process.url}/v1", api_key="sesame", max_retries=0, timeout=60)
        assert [one.id for one in client.models.list()] == ["talker"]
        asked: dict[str, Any] = {"model": "talker", "temperature": 0, "max_tokens": 100}
        answer = client.chat.completions.create(messages=[GREET], **asked).choices[0].message
        assert answer.content == "Hello!"
        assert answer.model_extra["reasoning_content"] == "They greet.\nSo do I."
        stream = client.chat.completions.create(messages=[GREET], stream=True, **asked)
        parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(parts) == "Hello!"
        assert len([part for part in parts if part]) > 1
        call = client.chat.completions.create(messages=[WEATHER], tools=[WEATHER_TOOL], **asked).choices[0]
        assert call.finish_reason == "tool_calls"
        assert json.loads(call.message.tool_calls[0].function.arguments) == {"city": "Paris"}
        client.close()
    finally:
        process.popen.send_signal(signal.SIGTERM)
        code = process.end()
    assert code == 0
    assert "SIGTERM, stopping" in process.text


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ("serve x.gguf", None),
        ("chat --max-tokens 3 a/X.GGUF", None),
        ("serve folder", "PASSIVE"),
        ("export run --output x.gguf", "PASSIVE"),
        ("chat http://h", "PASSIVE"),
    ],
)
def test_openmp_waits_asleep_except_for_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, words: str, policy: str | None
) -> None:
    """llama.cpp's threads meet several times a layer: asleep they generate ten times slower."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("sys.argv", ["ossia", *words.split(), "--help"])
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_a_server_that_is_dropped_as_soon_as_it_is_ready_ends(talking: Path) -> None:
    """In a process of its own: where it doesn't, nothing in this one could go on."""
    code = "import sys; from pathlib import Path; from ossia.web.gguf import LlamaOptions, start_llama\n"
    code += "for _ in range(5): start_llama(Path(sys.argv[1]), LlamaOptions(threads=1, ctx_size=512, parallel=1))"
    subprocess.run([sys.executable, "-c", code, str(talking)], cwd=ROOT, check=True, timeout=60)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_no_page_of_another_site_may_read_what_llama_cpp_answers(talking: Path) -> None:
    server = start_llama(talking, SMALL)
    for origin, allowed in (("https://example.net", None), ("http://localhost:3000", "http://localhost:3000")):
        request = urllib.request.Request(f"{server.listening_address}/v1/models", headers={"Origin": origin})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == allowed


def test_what_is_no_gpt_oss_gguf_file_is_said(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "llama.gguf", "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        step()
    whole = (tmp_path / "llama.gguf").read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "other": (whole, "`general.architecture` is 'llama'; allowed: 'gpt-oss'"),
        "nothing": (b"", "is no GGUF file, or cut short"),
        "text": (b"once upon a time, long ago", "is no GGUF file, or cut short"),
        "short": (whole[:30], "is no GGUF file, or cut short"),
        "bare": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "`general.architecture` is None"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            checked_gguf(str(tmp_path / f"{name}.gguf"))
    with pytest.raises(CheckpointError, match="no such file; `ossia export"):
        checked_gguf(str(tmp_path / "nowhere.gguf"))


def test_a_file_cut_short_is_said_with_llama_cpps_reason(
    talking: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.gguf").write_bytes(talking.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"llama\.cpp can't load it; its reasons are above"):
        run_gguf_server(str(tmp_path / "cut.gguf"), SMALL, port=0)
    assert "not within the file bounds" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "FILE", "-ot", "ffn=CUDA7"], "-ot ffn=CUDA7: expected PATTERN=BUFFER"),
        (["serve", "FILE", "-ot", "ffn"], "-ot ffn: expected PATTERN=BUFFER"),
        (["serve", "FILE", "--api-key", ""], "an empty key would let everybody in"),
        (["serve", "FILE", "--adapter", "a=b"], "--adapter or --allow-host: not for"),
        (["serve", "FILE", "--allow-host", "a"], "--adapter or --allow-host: not for"),
        (["serve", "FILE", "--weights", "mmap"], "--dtype, --weights or --device: not for"),
        (["serve", "FILE", "--drain", "1"], "--max-length, --int8-cache or --drain: not for"),
        (["serve", "FILE", "--int8-cache"], "--max-length, --int8-cache or --drain: not for"),
        (["serve", "FILE", "folder"], "llama.cpp's server has one model"),
        (["serve", "folder", "FILE"], "llama.cpp's server has one model"),
        (["chat", "FILE", "--adapter", "runs/x"], "--adapter: not for"),
        (["chat", "FILE", "--api-key", "x"], "--api-key is for a server"),
        (["chat", "folder", "-ngl", "3"], "--n-gpu-layers is llama.cpp's, which runs .gguf files"),
        (["serve", "folder", "-np", "3"], "--parallel is llama.cpp's"),
        (["chat", "http://127.0.0.1:9/x.gguf", "-t", "3"], "--threads is llama.cpp's"),
    ],
)
def test_options_for_another_kind_of_model_are_refused(talking: Path, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [str(talking) if word == "FILE" else word for word in words])
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_missing_package_and_a_taken_port_are_said(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_llama(talking, SMALL)
    port = int(server.listening_address.rpartition(":")[2])
    with pytest.raises(UserError, match=f"can't listen on 127.0.0.1 port {port}"):
        run_gguf_server(str(talking), SMALL, port=port)
    monkeypatch.setattr("ossia.web.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ossia\[gguf-run\]'"):
        run_gguf_chat(str(talking), SMALL, settings={})
