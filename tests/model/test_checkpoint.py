"""Checkpoint folders: strict to open, nothing read before it is wanted, and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ossia.errors import CheckpointError, TokenizerError
from ossia.model.arch import SHAPES, Arch, Layout
from ossia.model.checkpoint import TORCH_DTYPES, Checkpoint, write_checkpoint
from ossia.model.tiny import make_tiny, random_tensors

Tensors = dict[str, Tensor]
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Arch, small_tokenizer: Path) -> Path:
    """A single-file MXFP4 checkpoint."""
    path = tmp_path_factory.mktemp("whole") / "model"
    make_tiny(path, small, tokenizer=small_tokenizer)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, small: Arch, small_tokenizer: Path) -> Path:
    """The same weights in shards."""
    path = tmp_path_factory.mktemp("sharded") / "model"
    make_tiny(path, small, tokenizer=small_tokenizer, shard_bytes=60_000)
    return path


def _copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def _rewrite(file: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _edit_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_every_tensor_comes_back_as_it_was_written(
    layout: Layout, small: Arch, small_tokenizer: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    specs = small.tensor_specs(layout)
    tensors = {
        name: torch.randint(0, 256, (spec.num_bytes,), dtype=torch.uint8)
        .view(TORCH_DTYPES[spec.dtype])
        .view(spec.shape)
        for name, spec in specs.items()
    }
    backwards = reversed(tensors.items())
    write_checkpoint(tmp_path / "out", small, backwards, layout, tokenizer_from=small_tokenizer, shard_bytes=100_000)
    found = Checkpoint.open(tmp_path / "out")
    assert (found.arch, found.layout) == (small, layout)
    assert len(found.files) > 2
    for name, tensor in tensors.items():
        assert torch.equal(found.tensor(name).view(torch.uint8), tensor.view(torch.uint8)), name
        assert safe_open(found.file_of(name), "pt").get_tensor(name).shape == tensor.shape


def test_shards_hold_the_same_weights_as_one_file_and_keep_to_their_size(whole: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(whole), Checkpoint.open(sharded)
    assert [file.name for file in one.files] == ["model.safetensors"]
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.specs)
    assert one.num_bytes == many.num_bytes
    assert max(file.stat().st_size for file in many.files) < 70_000
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == one.num_bytes
    assert set(index["weight_map"]) == set(one.specs)


def test_bytes_of_a_checkpoint_survive_load_and_save(whole: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(whole)
    tensors = ((name, source.tensor(name)) for name in source.specs)
    write_checkpoint(tmp_path / "again", source.arch, tensors, source.layout, tokenizer_from=whole)
    for file in whole.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_opening_and_taking_tensors_reads_no_weight(small_tokenizer: Path, tmp_path: Path, small: Arch) -> None:
    big = replace(small, hidden_size=1024, vocab_size=30_000)
    zeros = ((name, torch.zeros(spec.shape, dtype=torch.bfloat16)) for name, spec in big.tensor_specs("bf16").items())
    write_checkpoint(tmp_path / "big", big, zeros, "bf16", tokenizer_from=small_tokenizer)
    process = psutil.Process()
    before = process.memory_info().rss
    checkpoint = Checkpoint.open(tmp_path / "big")
    tensors = [checkpoint.tensor(name) for name in checkpoint.specs]
    opened = process.memory_info().rss - before
    assert opened < 8e6 < checkpoint.num_bytes / 10
    for tensor in tensors:
        tensor.view(torch.int16).amax()
    assert process.memory_info().rss - before > 0.8 * checkpoint.num_bytes


def test_writing_to_a_loaded_tensor_never_reaches_the_file(whole: Path, tmp_path: Path) -> None:
    path = _copy(whole, tmp_path)
    before = (path / "model.safetensors").read_bytes()
    norm = Checkpoint.open(path).tensor("model.norm.weight")
    norm.fill_(5)
    assert (path / "model.safetensors").read_bytes() == before
    assert not (Checkpoint.open(path).tensor("model.norm.weight") == 5).any()


BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("model.layers.1.self_attn.sinks"), r"layers.1.self_attn.sinks` \[4\] BF16 is missing"),
    "unread": (lambda t: t.update(extra=torch.zeros(2)), "`extra` in model.safetensors belongs to no part"),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.zeros(65, dtype=torch.bfloat16)}),
        r"`model.norm.weight` in model.safetensors is \[65\] BF16; by config.json it must be \[64\] BF16",
    ),
    "wrong dtype": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].float()}),
        r"`lm_head.weight` in model.safetensors is \[\d+, 64\] F32; by config.json it must be \[\d+, 64\] BF16",
    ),
    "half mxfp4": (lambda t: t.pop(f"{GATE_UP}_scales"), rf"`{GATE_UP}_scales` \[5, 192, 2\] U8 is missing"),
    "bf16 under mxfp4 names": (
        lambda t: t.update({f"{GATE_UP}_blocks": torch.zeros(5, 64, 192, dtype=torch.bfloat16)}),
        "what transformers 5 saves of an MXFP4 model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(name: str, whole: Path, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    path = _copy(whole, tmp_path)
    _rewrite(path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


def test_a_config_of_another_model_lists_a_few_findings_and_counts_the_rest(whole: Path, tmp_path: Path) -> None:
    path = _copy(whole, tmp_path)
    _edit_json(path / "config.json", lambda config: config.update(hidden_size=128))
    with pytest.raises(CheckpointError, match=r"(?s)the mxfp4 checkpoint that config.json describes.*and \d+ more\n"):
        Checkpoint.open(path)


def _first_shards(path: Path) -> tuple[Path, Path]:
    first, second, *_ = sorted(path.glob("model-*.safetensors"))
    return first, second


def test_a_tensor_in_two_shards_is_refused(sharded: Path, tmp_path: Path) -> None:
    path = _copy(sharded, tmp_path)
    first, second = _first_shards(path)
    name, tensor = next(iter(load_file(first).items()))
    _rewrite(second, lambda tensors: tensors.update({name: tensor.clone()}))
    with pytest.raises(CheckpointError, match=f"`{name}` is in both {first.name} and {second.name}"):
        Checkpoint.open(path)


def test_a_tensor_that_the_index_lists_but_its_file_lacks_is_refused(sharded: Path, tmp_path: Path) -> None:
    path = _copy(sharded, tmp_path)
    first, _ = _first_shards(path)
    _rewrite(first, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=f"`model.embed_tokens.weight` is not in {first.name}, though the index"):
        Checkpoint.open(path)


def test_a_tensor_that_the_index_does_not_list_or_lists_elsewhere_is_refused(sharded: Path, tmp_path: Path) -> None:
    path = _copy(sharded, tmp_path)
    first, second = _first_shards(path)
    index = path / "model.safetensors.index.json"
    _edit_json(index, lambda content: content["weight_map"].update({"model.embed_tokens.weight": second.name}))
    with pytest.raises(CheckpointError, match=rf"is in {first.name}; the index says {second.name}"):
        Checkpoint.open(path)
    _edit_json(index, lambda content: content["weight_map"].pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=f"`model.embed_tokens.weight` is in {first.name} but not in the index"):
        Checkpoint.open(path)


def test_a_missing_an_unlisted_and_an_unindexed_shard_are_refused(sharded: Path, whole: Path, tmp_path: Path) -> None:
    path = _copy(sharded, tmp_path)
    first, second = _first_shards(path)
    stray = path / "model-99999-of-99999.safetensors"
    shutil.copyfile(second, stray)
    with pytest.raises(CheckpointError, match=f"{stray.name}'] would stay unread"):
        Checkpoint.open(path)
    stray.unlink()
    first.unlink()
    with pytest.raises(CheckpointError, match=f"index.json lists .*{first.name}'], not in the folder; download"):
        Checkpoint.open(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"needed: model.safetensors alone, or shards with model.safetensors.index"
    ):
        Checkpoint.open(path)


@pytest.mark.parametrize("keep", [0, 5, 2_000, -1])
def test_a_file_that_was_cut_short_is_detected(keep: int, whole: Path, tmp_path: Path) -> None:
    path = _copy(whole, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors is cut short or no safetensors file .*download it again"
    ):
        Checkpoint.open(path)


def test_a_folder_without_a_readable_config_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        Checkpoint.open(tmp_path / "nowhere")
    path = _copy(whole, tmp_path)
    (path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        Checkpoint.open(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        Checkpoint.open(path)


def test_a_config_that_denies_the_layout_is_refused(whole: Path, tmp_path: Path) -> None:
    path = _copy(whole, tmp_path)
    _edit_json(path / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="`quantization_config` is None but the experts are in the mxfp4 layout"):
        Checkpoint.open(path)


def test_a_taken_folder_is_left_alone(whole: Path, small: Arch, small_tokenizer: Path, tmp_path: Path) -> None:
    path = _copy(whole, tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        make_tiny(path, small, tokenizer=small_tokenizer)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def _left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError("diverged")])
def test_a_write_that_stops_half_way_leaves_nothing(
    error: BaseException | type[BaseException], small: Arch, small_tokenizer: Path, tmp_path: Path
) -> None:
    def stopping() -> Iterator[tuple[str, Tensor]]:
        for count, item in enumerate(random_tensors(small, "mxfp4", 0)):
            if count == 30:
                assert _left(tmp_path) == [".out.partial"]
                raise error
            yield item

    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        write_checkpoint(tmp_path / "out", small, stopping(), "mxfp4", tokenizer_from=small_tokenizer)
    assert _left(tmp_path) == []


def test_what_a_killed_writer_left_is_replaced(small: Arch, small_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    arch = make_tiny(tmp_path / "out", small, tokenizer=small_tokenizer)
    assert _left(tmp_path) == ["out"]
    assert Checkpoint.open(tmp_path / "out").arch == arch


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(small_tokenizer: Path, tmp_path: Path) -> None:
    petabyte = replace(SHAPES["120b"], num_experts=1_000_000)
    with pytest.raises(CheckpointError, match=r"No space left on device. It needs \d+\.\d\d GB, \d+\.\d\d GB are free"):
        make_tiny(tmp_path / "out", petabyte, tokenizer=small_tokenizer)
    assert _left(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from ossia.errors import CheckpointError
from ossia.model.arch import SHAPES
from ossia.model.tiny import make_tiny
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    make_tiny(Path(sys.argv[1]), SHAPES["demo"], tokenizer=Path(sys.argv[2]))
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_refuses_half_way_leaves_nothing_and_the_message_says_what_is_needed(
    small_tokenizer: Path, tmp_path: Path
) -> None:
    """A file size limit stands for the full disk: the same failing write, and no root needed to have it."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "out"), str(small_tokenizer)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "File too large. It needs 0.07 GB" in result.stdout
    assert "nothing was kept" in result.stdout
    assert _left(tmp_path) == []


def test_the_sources_own_text_files_are_kept(whole: Path, tmp_path: Path) -> None:
    source = _copy(whole, tmp_path)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    _edit_json(source / "generation_config.json", lambda config: config.update(temperature=0.5))
    make_tiny(tmp_path / "out", Checkpoint.open(source).arch, tokenizer=source)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_tokenizer_that_is_not_gpt_osss_is_refused(small: Arch, small_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"no such file; .*\n  next: name a checkpoint folder or a tokenizer\.json"
    ):
        make_tiny(tmp_path / "out", small, tokenizer=tmp_path / "tokenizer.json")
    other = tmp_path / "tokenizer.json"
    shutil.copyfile(small_tokenizer, other)
    _edit_json(other, lambda content: content["added_tokens"].clear())
    with pytest.raises(TokenizerError, match=r"no special tokens \['<\|call\|>', '<\|endoftext\|>', "):
        make_tiny(tmp_path / "out", small, tokenizer=other)
    other.write_text("[]")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json"):
        make_tiny(tmp_path / "out", small, tokenizer=other)
    assert _left(tmp_path) == ["tokenizer.json"]
