"""What is cut over ranks is saved by all of them, and goes on with any number of them, bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ossia.errors import CheckpointError, RunError
from ossia.train.optim import AdamW
from ossia.train.shards import form
from ossia.train.shards.form import Shards
from ossia.train.state import SavedState, checkpoint_paths, newest_checkpoint, save_checkpoint, seed_generators, verify
from tests.train.shards.support import SHAPES, Group, save_as_ranks, train, whole_at


def contents(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint; the host's name is in no file but the manifest."""
    return {str(f.relative_to(run)): f.read_bytes() for path in checkpoint_paths(run) for f in path.iterdir()}


def check_whole(run: Path, step: int) -> None:
    """The newest checkpoint holds every tensor as it should be after `step` steps."""
    saved = newest_checkpoint(run, pytest.fail)
    assert saved is not None
    assert saved.step == step
    shards = Shards(saved.path)
    for name, expected in whole_at(step).items():
        assert torch.equal(shards.read(name, 0, len(expected)), expected), name


def test_four_then_two_then_three_ranks_go_on_from_each_others_checkpoints(tmp_path: Path) -> None:
    """What each restores is compared, bit for bit, with what it should be: in `train`."""
    run = tmp_path / "run"
    for size, steps in ((4, 4), (2, 6), (3, 8)):
        group = Group(size, tmp_path / f"out-{size}", train, run, steps, resume=size != 4)
        assert group.wait() == [0] * size, group.errors()
        assert [path.name for path in checkpoint_paths(run)] == [f"step-{s:08d}" for s in (steps - 2, steps)]
        assert sum(file.suffix == ".distcp" for file in checkpoint_paths(run)[-1].iterdir()) == size
        check_whole(run, steps)
    assert "going on from step 6" in group.said(0)


def test_saving_beside_training_or_not_leaves_the_same_bytes(tmp_path: Path) -> None:
    runs = tmp_path / "beside", tmp_path / "waiting"
    groups = [Group(2, tmp_path / f"out-{run.name}", train, run, 4, beside=run == runs[0]) for run in runs]
    assert [group.wait() for group in groups] == [[0, 0], [0, 0]]
    assert contents(runs[0]) == contents(runs[1])
    assert len(contents(runs[0])) == 2 * 5  # two ranks' files, the metadata, the state and the manifest


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_any_range_of_a_tensor_is_read_in_pieces_and_dcp_itself_reads_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form, "PIECE", 7)
    whole = whole_at(0)
    place = save_as_ranks(tmp_path, 1, whole, 3)
    shards = Shards(place)
    for name in ("odd", "half", "one"):
        for start in range(len(whole[name])):
            for count in range(len(whole[name]) - start + 1):
                assert torch.equal(shards.read(name, start, count), whole[name][start : start + count])
    assert shards.files_of("wide", 0, 1) == {"__0_0.distcp"}
    assert shards.files_of("wide", 399, 2) == {"__0_0.distcp", "__1_0.distcp"}
    found = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(place), no_dist=True)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def test_metadata_that_names_anything_else_is_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(CheckpointError, match=r"builtins\.print, which is no part of a checkpoint's metadata"):
        Shards(tmp_path)
    assert capsys.readouterr().out == ""


def adamw(**tensors: torch.Tensor) -> AdamW:
    return AdamW(tensors, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


def trained() -> AdamW:
    """One process's optimizer after an update."""
    optimizer = adamw(wide=torch.full((40, 30), 0.5), odd=torch.arange(7.0))
    for tensor in optimizer.params.values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.update(loss=1.0, lr=0.1, clip=None)
    return optimizer


def test_one_process_goes_on_from_what_ranks_saved(tmp_path: Path) -> None:
    saved, alone = trained(), adamw(wide=torch.zeros(40, 30), odd=torch.zeros(7))
    every = {**saved.params, **saved.state_dict()}
    every.pop("num_updates")
    place = save_as_ranks(tmp_path, 1, every, 3)
    assert newest_checkpoint(tmp_path, pytest.fail).path == place
    SavedState(place, 1, {}).restore(alone.params, alone)
    found = {**alone.params, **alone.state_dict()}
    assert all(torch.equal(found[name], tensor) for name, tensor in {**every, **saved.state_dict()}.items())
    other = adamw(wide=torch.zeros(30, 40), odd=torch.zeros(7))
    with pytest.raises(
        RunError, match=r"`exp_avg.wide` is \(40, 30\) torch.float32 there, \(30, 40\) torch.float32 in"
    ):
        SavedState(place, 1, {}).restore(other.params, other)
    assert not other.params["odd"].any()


def test_ranks_go_on_from_what_one_process_saved(tmp_path: Path) -> None:
    """One process writes today's format for whole tensors, which ranks read their parts of."""
    params = {name: whole.view(SHAPES[name]) for name, whole in whole_at(2).items() if not name.startswith("exp_avg")}
    optimizer = adamw(x=torch.zeros(1))
    moments = {name: whole.view(SHAPES[name]) for name, whole in whole_at(2).items() if name.startswith("exp_avg")}
    optimizer.state_dict = lambda: {"num_updates": torch.tensor(2), **moments}  # type: ignore[method-assign]
    progress = {"data": 2, "events_bytes": 0}
    seed_generators(5)
    torch.rand(2)
    place = save_checkpoint(tmp_path / "run", step=2, params=params, optimizer=optimizer, progress=progress, keep=2)
    assert verify(place) is None
    group = Group(3, tmp_path / "out", train, tmp_path / "run", 4, resume=True)
    assert group.wait() == [0, 0, 0], group.errors()
    check_whole(tmp_path / "run", 4)
