"""A GGUF file back to a Hugging Face folder: bit for bit where the file has the bits, and refused where it hasn't."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

import ossia
from ossia.errors import CheckpointError, Interrupted, StoppedError, TokenizerError, UserError
from ossia.export import export_model
from ossia.export.gguf.file import GgufFile
from ossia.export.gguf.tokenizer import write_tokenizer
from ossia.export.gguf.write import write_gguf
from ossia.export.merge import Changes
from ossia.harmony import Vocabulary
from ossia.model.checkpoint import Checkpoint
from ossia.model.tiny import make_tiny
from ossia.pieces import Journal
from tests.conftest import MakeTiny
from tests.shapes import LEAST, SHALLOW, UNEQUAL

TEXTS = [
    "You are ChatGPT.", "it's WE'LL don't", "  two  spaces\t\r\n\n", "12345 1,000.50", "naïve Straße 東京 🎼 \u0301a",
    "<|start|>user<|message|>as text", "def f(x):\n    return x ** 2  # é", "\x00\x7f\ufeff", "", " ",
]  # fmt: skip


def to_gguf(model: Path, file: Path, **options: str) -> Path:
    return export_model(str(model), to="gguf", output=file, **options)


def back(file: Path, folder: Path, to: str = "hf-bf16", tokenizer: Path | None = None) -> Path:
    return export_model(str(file), to=to, output=folder, tokenizer=tokenizer)


def same_files(found: Path, wanted: Path) -> None:
    names = sorted(file.name for file in wanted.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    assert filecmp.cmpfiles(found, wanted, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_an_mxfp4_model_comes_back_as_the_same_files(tiny: MakeTiny, tmp_path: Path, kind: str) -> None:
    model = tiny(UNEQUAL)
    blocks = Checkpoint.open(model).tensor("model.layers.0.mlp.experts.down_proj_blocks")
    assert 8 in blocks & 15, "no -0.0 among the codes: the test would show less"
    file = to_gguf(model, tmp_path / "x.gguf", gguf_type=kind)
    same_files(back(file, tmp_path / "back", "hf-mxfp4"), model)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_a_model_comes_back_in_bf16_as_its_own_export_in_bf16(tiny: MakeTiny, tmp_path: Path, layout: str) -> None:
    model = tiny(UNEQUAL, layout)
    wanted = export_model(str(model), to="hf-bf16", output=tmp_path / "wanted")
    same_files(back(to_gguf(model, tmp_path / "x.gguf"), tmp_path / "back"), wanted)


@pytest.mark.parametrize(("kind", "off"), [("q8_0", 0.5 / 127 + 2.0**-8), ("f16", 2.0**-8)])
def test_other_types_come_back_within_their_rounding_and_say_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, off: float
) -> None:
    back(to_gguf(trained, tmp_path / "x.gguf", gguf_type=kind), tmp_path / "back")
    found, wanted = Checkpoint.open(tmp_path / "back"), Checkpoint.open(trained)
    assert found.arch == wanted.arch
    for name in wanted.specs:
        ours, theirs = (one.tensor(name).float() for one in (found, wanted))
        if name.endswith(("bias", "sinks", "norm.weight", "router.weight")):
            assert torch.equal(ours, theirs), name
            continue
        along = 1 if ".experts." in name else -1  # the inputs, of which 32 share a scale
        blocks = (ours - theirs).abs().transpose(along, -1).unflatten(-1, (-1, 32))
        size = theirs.abs().transpose(along, -1).unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
        assert (blocks <= size * off * 1.01 + 2.0**-24).all(), name
    said = "rounded to bfloat16" in capsys.readouterr().err
    assert said == (kind == "q8_0"), "what was bfloat16 before float16 has no bit more now"


def test_the_tokenizer_in_the_file_gives_the_ids_of_the_models_own(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(SHALLOW)
    folder = back(to_gguf(model, tmp_path / "x.gguf"), tmp_path / "back")
    ours, theirs = Vocabulary.from_file(folder), Vocabulary.from_file(model)
    rng = np.random.default_rng(0)
    drawn = [bytes(rng.integers(0, 256, 40, dtype=np.uint8)).decode("utf-8", "replace") for _ in range(300)]
    # parts of words side by side, which only the order of merges puts together in one way
    parts = [theirs.decode(rng.integers(0, theirs.size - len(theirs.special), 12).tolist()) for _ in range(300)]
    for text in [*TEXTS, *drawn, *parts]:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.special == theirs.special


def test_the_released_tokenizer_comes_back_byte_for_byte(o200k_tokenizer: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "model", LEAST, tokenizer=o200k_tokenizer)
    with Journal.open(tmp_path / "x.gguf", {}, lambda text: None) as journal:
        write_gguf(journal, Checkpoint.open(tmp_path / "model"), Changes(), name="x")
    (tmp_path / "out").mkdir()
    write_tokenizer(GgufFile.open(tmp_path / "x.gguf"), tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert filecmp.cmp(tmp_path / "out" / name, tmp_path / "model" / name, shallow=False), name


def test_what_comes_back_can_be_trained(tiny: MakeTiny, tmp_path: Path) -> None:
    folder = back(to_gguf(tiny(SHALLOW), tmp_path / "x.gguf"), tmp_path / "back", "hf-mxfp4")
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = {"model": str(folder), "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "run")}
    train = {"steps": 2, "tokens_per_step": 256, "learning_rate": 1e-2, "warmup": 0}
    run = ossia.train(recipe | {"adapter": {"rank": 2}, "max_length": 256, "train": train})
    assert run.step == 2


def test_one_that_was_interrupted_goes_on_where_it_was(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(UNEQUAL)
    file, pwrite, left = to_gguf(model, tmp_path / "x.gguf"), os.pwrite, [17]

    def pulled(handle: int, raw: memoryview, place: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return pwrite(handle, raw, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pulled)
        with pytest.raises(Interrupted):
            back(file, tmp_path / "back", "hf-mxfp4")
    capsys.readouterr()
    same_files(back(file, tmp_path / "back", "hf-mxfp4"), model)
    assert "are whole and kept" in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_full_folder_of_temporary_files_is_told_and_costs_nothing(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(SHALLOW)
    whole = to_gguf(model, tmp_path / "whole.gguf")
    for output, run in (
        (tmp_path / "x.gguf", lambda output: to_gguf(model, output)),
        (tmp_path / "folder", lambda output: back(whole, output)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("tempfile.tempdir", str(tmp_path / "gone"))
            with pytest.raises(StoppedError, match=r"gone: no small files can be written there(.|\n)*in TMPDIR"):
                run(output)
        run(output)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "whole.gguf", "x.gguf"]


def with_type(raw: bytes, name: str, kind: GGMLQuantizationType) -> bytes:
    """A file in which a tensor's type is said to be another."""
    at = raw.index(name.encode()) + len(name)
    at += 4 + 8 * int.from_bytes(raw[at : at + 4], "little")
    return raw[:at] + int(kind).to_bytes(4, "little") + raw[at + 4 :]


def with_value(raw: bytes, key: str, found: str, other: str) -> bytes:
    assert len(found) == len(other)
    at = raw.index(found.encode(), raw.index(key.encode()) + len(key))
    return raw[:at] + other.encode() + raw[at + len(found) :]


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a K-quant": (
        lambda raw: with_type(raw, "blk.0.attn_q.weight", GGMLQuantizationType.Q4_K),
        r"`blk\.0\.attn_q\.weight` is in Q4_K\n.*MXFP4, BF16, F16, F32, Q8_0",
    ),
    "another model": (lambda raw: with_value(raw, "general.architecture", "gpt-oss", "gemma00"), "'gemma00' model"),
    "another rope": (lambda raw: with_value(raw, "rope.scaling.type", "yarn", "none"), "is 'none'; allowed: 'yarn'"),
    "cut short": (lambda raw: raw[:-4096], "cut short"),
    "a head cut short": (lambda raw: raw[:900], "cut short"),
    "something else": (lambda raw: b"PK" + raw[2:], "no GGUF file"),
    "another tensor": (lambda raw: raw.replace(b"blk.1.attn_q.bias", b"blk.1.attn_y.bias"), "attn_q.bias` is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_no_such_model_is_refused_and_nothing_is_left(
    tiny: MakeTiny, tmp_path: Path, change: str
) -> None:
    file = to_gguf(tiny(SHALLOW), tmp_path / "x.gguf")
    changed, said = CHANGES[change]
    file.write_bytes(changed(file.read_bytes()))
    with pytest.raises(CheckpointError, match=said):
        back(file, tmp_path / "back")
    assert list(tmp_path.iterdir()) == [file]


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "gpt-oss")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of 2 parts; join them"):
        back(tmp_path / "x.gguf", tmp_path / "back")


def test_another_programs_tokenizer_is_refused_unless_one_is_named(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(SHALLOW)
    file = to_gguf(model, tmp_path / "x.gguf")
    file.write_bytes(with_value(file.read_bytes(), "tokenizer.ggml.pre", "gpt-4o", "qwen35"))
    with pytest.raises(TokenizerError, match=r"`tokenizer\.ggml\.pre` is 'qwen35'[^\n]*\n.*--tokenizer FOLDER"):
        back(file, tmp_path / "back")
    assert list(tmp_path.iterdir()) == [file]
    same_files(back(file, tmp_path / "back", "hf-mxfp4", tokenizer=model), model)


def test_experts_that_are_not_in_mxfp4_are_not_rounded_unasked(tiny: MakeTiny, tmp_path: Path) -> None:
    file = to_gguf(tiny(SHALLOW, "bf16"), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"ffn_gate_exps.weight` is in BF16.*\n.*--to hf-bf16, then"):
        back(file, tmp_path / "back", "hf-mxfp4")


def test_what_cannot_be_asked_of_a_gguf_file_is_said(tiny: MakeTiny, tmp_path: Path) -> None:
    model = tiny(SHALLOW)
    with pytest.raises(UserError, match="--to peft: of a GGUF file Ossia writes a folder alone"):
        back(tmp_path / "x.gguf", tmp_path / "back", "peft")
    with pytest.raises(UserError, match="takes no --adapter"):
        export_model("x.gguf", to="hf-bf16", output=tmp_path / "back", adapter=str(model))
    with pytest.raises(UserError, match="--tokenizer is for a GGUF file"):
        back(model, tmp_path / "back", tokenizer=model)
    with pytest.raises(CheckpointError, match=r"x\.gguf: .*No such file"):
        back(tmp_path / "x.gguf", tmp_path / "back")
