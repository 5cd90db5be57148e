"""`ossia merge-shards`: what ranks saved in parts comes out as one folder, as if one process had written it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ossia.cli import main
from ossia.config import Recipe
from ossia.errors import StoppedError, UserError
from ossia.export import export_model, merge_shards, write_model
from ossia.model.arch import alternating_layers
from ossia.model.checkpoint import Checkpoint
from ossia.model.tiny import make_tiny
from ossia.model.transformer import Transformer
from ossia.train.shards import form
from tests.conftest import MakeTiny
from tests.export.conftest import MakeRun
from tests.oracle.model_pairs import documents, load, load_transformers, pack_of, relative_error
from tests.shapes import SHALLOW
from tests.train.shards.support import save_as_ranks


def trained(path: Path, seed: int = 0) -> Transformer:
    """A model whose every weight has moved."""
    model = load(path)
    model.train_all_weights()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.trainable.tensors.values():
        tensor.mul_(1 + 0.05 * torch.randn(tensor.shape, generator=generator))
    return model


def with_moments(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As an optimizer's state comes beside the weights."""
    return {**tensors, **{f"exp_avg.{name}": torch.full_like(tensor, 9.0) for name, tensor in tensors.items()}}


@pytest.fixture
def run(tiny: MakeTiny, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three ranks that trains all weights, with the checkpoints of steps 4 and 8."""
    monkeypatch.setattr(form, "PIECE", 1000)
    path = tiny(SHALLOW)
    run = make_run(path)
    for step in (4, 8):
        save_as_ranks(run, step, with_moments(trained(path, step).trainable.tensors), 3)
    return run


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_shards_are_merged_into_what_one_process_would_have_written_and_transformers_loads_it(
    run: Path, tiny: MakeTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny(SHALLOW)
    monkeypatch.setattr(sys, "argv", ["ossia", "merge-shards", str(run)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (0, f"{run / 'merged'}\n")
    assert "exporting step-00000008" in said.err
    assert said.err.index("it takes 0.07 GB in ") < said.err.index("read back and compared")
    write_model(tmp_path / "bf16", trained(path, 8), tokenizer_from=path)
    assert weights(run / "merged") == weights(tmp_path / "bf16")
    pack = pack_of(documents(Checkpoint.open(path).arch, (200,)))
    with torch.no_grad():
        theirs = load_transformers(run / "merged")(pack.ids[None]).logits[0]
    assert relative_error(load(run / "merged").logits(pack), theirs) <= 1e-5

    merge_shards(run, to="hf-mxfp4", output=tmp_path / "packed", max_kl=9.0)
    write_model(tmp_path / "mxfp4", trained(path, 8), tokenizer_from=path, layout="mxfp4")
    assert weights(tmp_path / "packed") == weights(tmp_path / "mxfp4")
    export_model(str(run), to="hf-bf16", output=tmp_path / "exported")
    assert weights(tmp_path / "exported") == weights(tmp_path / "bf16")


def test_the_last_complete_checkpoint_is_found_and_where_there_is_none_it_is_said(
    run: Path, tiny: MakeTiny, tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path, newest = tiny(SHALLOW), run / "checkpoints" / "step-00000008"
    (newest / "__1_0.distcp").unlink()
    merge_shards(run)
    said = capsys.readouterr().err
    assert "step-00000008: __1_0.distcp, written by rank 0 on here, isn't there" in said
    assert "trying the checkpoint before it" in said
    write_model(tmp_path / "wanted", trained(path, 4), tokenizer_from=path)
    assert weights(run / "merged") == weights(tmp_path / "wanted")
    (run / "model").mkdir()  # a finished run's result is not what is asked for
    merge_shards(run, output=tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "wanted")
    (run / "checkpoints" / "step-00000004" / "__2_0.distcp").unlink()
    with pytest.raises(
        UserError, match=r"(?s)step-00000008: __1_0\.distcp, written by rank 0 on here.*copy them there"
    ):
        merge_shards(run, output=tmp_path / "neither")
    with pytest.raises(UserError, match=r"no run folder, it holds no recipe\.yaml"):
        merge_shards(tmp_path)
    for place in (run / "checkpoints").iterdir():
        for file in place.iterdir():
            file.unlink()
    with pytest.raises(UserError, match="no checkpoint there is in shards; `ossia export"):
        merge_shards(run, output=tmp_path / "none")


def test_a_full_disk_keeps_what_is_whole_and_the_same_command_goes_on_from_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_shards(run)
    pwrite, calls = os.pwrite, 0

    def refused(handle: int, raw: bytes, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, raw, at)

    monkeypatch.setattr(os, "pwrite", refused)
    with pytest.raises(StoppedError, match=r"(?s)No space left on device.*run the same command again"):
        merge_shards(run, output=tmp_path / "twice")
    monkeypatch.undo()
    capsys.readouterr()
    merge_shards(run, output=tmp_path / "twice")
    assert "are whole and kept" in capsys.readouterr().err
    assert weights(tmp_path / "twice") == weights(run / "merged")


MEMORY = """
import sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from ossia.export import export, merge_shards

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch(done, peak):
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

export.verify_export = lambda *_, **__: None
for run in sys.argv[1:]:
    done, peak = threading.Event(), [0]
    threading.Thread(target=watch, args=(done, peak), daemon=True).start()
    merge_shards(Path(run))
    done.set()
    print(peak[0])
"""


def test_merging_takes_the_memory_of_some_pieces_whatever_the_model_is(
    small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of a model twice as deep, with experts four times as many, is larger by less than one tensor."""
    monkeypatch.setattr(form, "PIECE", 2**18)
    runs = []
    for layers, experts in ((1, 8), (2, 32)):
        arch = replace(SHALLOW, num_layers=layers, layer_types=alternating_layers(layers), num_experts=experts)
        arch = replace(arch, hidden_size=256, intermediate_size=512)
        model, run = tmp_path / f"model-{layers}", tmp_path / f"run-{layers}"
        make_tiny(model, arch, tokenizer=small_tokenizer)
        save_as_ranks(run, 1, trained(model).trainable.tensors, 2)
        recipe = {"model": str(model), "data": {"path": "x.jsonl"}, "output": str(run)}
        (run / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml())
        runs.append(str(run))
    keeps_nothing = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEMORY, *runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, env=keeps_nothing)
    small, large = map(int, done.stdout.split())
    gate_up_bytes = 4 * 2 * 256 * 512 * 32
    assert large - small < gate_up_bytes / 2, (small, large, gate_up_bytes)
