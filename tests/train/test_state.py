from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ossia.errors import RunError
from ossia.train.optim import AdamW
from ossia.train.state import (
    check_room,
    checkpoint_bytes,
    checkpoint_paths,
    human_bytes,
    newest_checkpoint,
    save_checkpoint,
    seed_generators,
    verify,
)
from tests.train.disks import small_disk_at

MIB = 2**20


def silent(text: str) -> None:
    raise AssertionError(text)


def trained(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], AdamW]:
    """Two parameters and their optimizer after one update."""
    generator = torch.Generator().manual_seed(1)
    params: dict[str, Tensor] = {
        name: nn.Parameter(torch.randn(size, 3, generator=generator).to(dtype)) for name in ("q.lora_A", "q.lora_B")
    }
    optimizer = AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.update(loss=1.0, lr=0.1, clip=None)
    return params, optimizer


def save(run: Path, step: int, size: int = 4, keep: int = 2) -> Path:
    params, optimizer = trained(size)
    return save_checkpoint(
        run, step=step, params=params, optimizer=optimizer, progress={"data": {"row": step}}, keep=keep
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back_bit_for_bit_with_the_random_generators(tmp_path: Path, dtype: torch.dtype) -> None:
    params, optimizer = trained(dtype=dtype)
    seed_generators(5)
    draws()
    progress = {"data": {"epoch": 1, "share": 0.1 + 0.2}, "evaluated": None}
    save_checkpoint(tmp_path, step=7, params=params, optimizer=optimizer, progress=progress, keep=1)
    expected = draws()
    other_params = {name: nn.Parameter(torch.zeros_like(param)) for name, param in params.items()}
    other = AdamW(other_params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    seed_generators(99)
    saved = newest_checkpoint(tmp_path, silent)
    assert saved is not None
    saved.restore(other_params, other)
    assert (saved.step, saved.progress) == (7, progress)
    assert draws() == expected
    wanted, found = optimizer.state_dict() | params, other.state_dict() | other_params
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_same_seed_starts_every_generator_at_the_same_place() -> None:
    seed_generators(3)
    first = draws()
    seed_generators(3)
    assert draws() == first
    seed_generators(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000, 200_000_000):
        save(tmp_path, step, keep=3)
    assert [p.name for p in checkpoint_paths(tmp_path)] == ["step-00000010", "step-100000000", "step-200000000"]
    assert len(names(tmp_path)) == 3


def test_leftovers_of_a_killed_save_are_removed_by_the_next_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".partial-step-00000002").mkdir()
    (tmp_path / "checkpoints" / ".old-step-00000000").mkdir()
    assert newest_checkpoint(tmp_path, silent).step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit in the tensors": ("trainable.safetensors", flip_a_byte, "sha256 differs"),
    "a flipped bit in the optimizer": ("optimizer.safetensors", flip_a_byte, "sha256 differs"),
    "a flipped bit in the state": ("state.json", flip_a_byte, "sha256 differs"),
    "a short file": ("optimizer.safetensors", shorten, "bytes where"),
    "a missing file": ("trainable.safetensors", Path.unlink, "No such file"),
    "no manifest": ("manifest.json", Path.unlink, "its manifest.json can't be read"),
    "half a manifest": ("manifest.json", shorten, "its manifest.json can't be read"),
    "a manifest of nothing": ("manifest.json", lambda p: p.write_text("[]"), "its manifest.json can't be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    file, harm, words = DAMAGE[damage]
    harm(tmp_path / "checkpoints" / "step-00000003" / file)
    said: list[str] = []
    saved = newest_checkpoint(tmp_path, said.append)
    assert saved.step == 2
    assert len(said) == 1
    assert "step-00000003: " in said[0]
    assert words in said[0]
    assert "set aside as step-00000003.corrupt" in said[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003.corrupt"]
    save(tmp_path, 3)  # the run goes on and comes by again
    assert newest_checkpoint(tmp_path, silent).step == 3


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_byte(save(tmp_path, step) / "state.json")
    for _ in range(2):  # a script that tries again must not begin anew over what is left of the run
        with pytest.raises(RunError, match=r"(?s)none of its 2 checkpoints is whole.*next: .* remove .*\.corrupt"):
            newest_checkpoint(tmp_path, lambda text: None)
    assert names(tmp_path) == ["step-00000001.corrupt", "step-00000002.corrupt"]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001.corrupt")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002.corrupt")
    assert newest_checkpoint(tmp_path, silent) is None


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, silent) is None


def test_a_checkpoint_of_another_recipe_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, size=4)
    params, optimizer = trained(size=5)
    before = {name: param.detach().clone() for name, param in params.items()}
    with pytest.raises(RunError, match=r"`q.lora_A` is \(\(4, 3\), 'torch.float32'\) there, \(\(5, 3\), "):
        newest_checkpoint(tmp_path, silent).restore(params, optimizer)
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_the_promised_size_covers_what_is_written(tmp_path: Path) -> None:
    params, optimizer = trained(size=50_000)
    place = save(tmp_path, 1, size=50_000)
    written = sum(file.stat().st_size for file in place.iterdir())
    assert written <= checkpoint_bytes(params, optimizer) <= 1.1 * written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    with small_disk_at(tmp_path / "disk", "4m", "the test with a file size limit covers the same code") as disk:
        yield disk


def test_a_full_disk_says_what_was_being_saved_what_it_needs_and_what_is_safe(small_disk: Path) -> None:
    run, size = small_disk / "run", 40_000  # three float32 tables of 2 x 40,000 x 3: 2.7 MiB
    first = save(run, 10, size=size)
    with pytest.raises(RunError) as caught:
        save(run, 20, size=size)
    message = str(caught.value)
    assert "can't save the checkpoint" in message
    assert "step-00000020: No space left on device\n" in message
    assert "needed: 2.8 MiB\n" in message
    assert f"safe: {first} and all that it holds\n" in message
    assert "next: free some space there, then run the same command with --resume to go on from step 10" in message
    assert names(run) == ["step-00000010"]
    assert verify(first) is None
    shutil.rmtree(first)  # room again: the next save works
    save(run, 20, size=size)
    assert newest_checkpoint(run, silent).step == 20


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_training(small_disk: Path) -> None:
    params, optimizer = trained(size=70_000)
    with pytest.raises(RunError, match=r"needs 4\.9 MiB and the disk has 4\.0 MiB free"):
        check_room(small_disk, params, optimizer)
    check_room(small_disk, *trained(size=4))
    left = small_disk / "checkpoints" / ".partial-step-00000002"
    left.mkdir(parents=True)
    (left / "optimizer.safetensors").write_bytes(bytes(4 * MIB - 16384))
    check_room(small_disk, *trained(size=4))
    assert not left.exists()


def test_a_file_size_limit_loses_nothing_that_was_saved_before(tmp_path: Path) -> None:
    first = save(tmp_path, 1, size=60_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(RunError, match=r"(?s)step-00000002: File too large.*go on from step 1"):
            save(tmp_path, 2, size=60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step-00000001"]
    assert verify(first) is None


def test_a_first_save_that_fails_says_that_nothing_was_saved_yet(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(RunError, match=r"(?s)File exists.*safe: nothing yet.*mend that, .* to start again"):
        save(tmp_path, 1)


def test_a_checkpoint_holds_its_manifest_and_step(tmp_path: Path) -> None:
    place = save(tmp_path, 12)
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["step"] == 12
    assert sorted(manifest["files"]) == ["optimizer.safetensors", "state.json", "trainable.safetensors"]
    assert verify(place) is None


def test_sizes_are_told_in_binary_units() -> None:
    assert [human_bytes(n) for n in (5, 1536, 3 * MIB, 13.8 * 2**30, 2**41)] == [
        "5 B",
        "1.5 KiB",
        "3.0 MiB",
        "13.8 GiB",
        "2.0 TiB",
    ]
