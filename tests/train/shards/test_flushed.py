"""What a checkpoint's rename makes visible is on the disk by then: files and folder flushed before, its place after."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ossia.train.optim import AdamW
from ossia.train.ranks.world import World
from ossia.train.shards.form import Part
from ossia.train.shards.save import Saver
from ossia.train.state import save_checkpoint


class Alone:
    """One rank, as far as a saver asks."""

    rank, size, leads = 0, 1, True

    def gather_beside(self, value: Any) -> list[Any]:
        return [value]

    def busy(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def saved_by_ranks(run: Path) -> None:
    saver = Saver(run, cast(World, Alone()), {"w": (12,)}, start=0, keep=1, beside=False)
    saver.save(3, {"w": Part(12, 0, torch.arange(12.0))}, num_updates=3, progress={})


def saved_alone(run: Path) -> None:
    params = {"w": torch.zeros(12)}
    optimizer = AdamW(params, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
    save_checkpoint(run, step=3, params=params, optimizer=optimizer, progress={}, keep=1)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know which file is flushed")
@pytest.mark.parametrize("act", [saved_by_ranks, saved_alone])
def test_all_of_a_checkpoint_is_flushed_before_its_rename_and_the_rename_after(
    act: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def flushed(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        if Path(new).parent.name == "checkpoints":
            done.append(("rename", Path(old)))

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    act(tmp_path)
    monkeypatch.undo()
    place = tmp_path / "checkpoints" / "step-00000003"
    ((number, partial),) = ((n, path) for n, (what, path) in enumerate(done) if what == "rename")
    before, after = ({path for _, path in some} for some in (done[:number], done[number + 1 :]))
    # DCP renames its metadata once that is flushed
    names = {path.name.removesuffix(".tmp") for path in before if path.parent == partial}
    assert names == {file.name for file in place.iterdir()}
    assert len(names) > 2
    assert partial in before
    assert place.parent in after
