"""An export that stopped goes on where it was: killed anywhere, out of room, interrupted; and never with foreign parts.

Each is compared with what an export leaves that nobody disturbed, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ossia.errors import CheckpointError, Interrupted, StoppedError, UserError
from ossia.export import export_model
from ossia.export.merge import Changes
from ossia.export.source import Source
from ossia.model.checkpoint import Checkpoint
from ossia.model.peft import save_adapter
from tests.conftest import MakeTiny
from tests.export.conftest import arch_of, random_lora
from tests.shapes import SHALLOW
from tests.train.small_run import forkserver

FORMATS = ("hf-bf16", "hf-mxfp4", "gguf")


@dataclass(frozen=True)
class Job:
    """An export, and what it leaves undisturbed."""

    model: Path
    adapter: Path
    to: str
    wanted: Path

    def run(self, output: Path, adapter: Path | None = None) -> None:
        export_model(str(self.model), to=self.to, output=output, adapter=str(adapter or self.adapter))


def bytes_of(output: Path) -> dict[str, bytes]:
    files = [output] if output.is_file() else output.iterdir()
    return {"" if file == output else file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def jobs(tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder, model = tmp_path_factory.mktemp("export"), tiny(SHALLOW)
    for seed in (1, 2):
        save_adapter(folder / f"adapter-{seed}", random_lora(arch_of(model), seed=seed), base_model="model")
    jobs = {to: Job(model, folder / "adapter-1", to, folder / "wanted" / f"out-{to}") for to in FORMATS}
    (folder / "wanted").mkdir()
    for job in jobs.values():
        job.run(job.wanted)
    return jobs


@contextmanager
def counting_writes(at: Callable[[int, int, memoryview, int], None]) -> Iterator[list[int]]:
    """While entered: `at(number, file, bytes, place)` before each write of weights; the lengths of those done."""
    pwrite, done = os.pwrite, list[int]()

    def counted(handle: int, raw: memoryview, place: int) -> int:
        at(len(done) + 1, handle, raw, place)
        done.append(len(raw))
        return pwrite(handle, raw, place)

    os.pwrite = counted
    try:
        yield done
    finally:
        os.pwrite = pwrite


def export_and_die(job: Job, output: Path, where: str, number: int) -> None:
    torch.set_num_threads(1)
    pwrite, write, rename = os.pwrite, os.write, os.rename

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_a_piece(count: int, handle: int, raw: memoryview, place: int) -> None:
        if where == "in a piece" and count == number:
            pwrite(handle, raw[: len(raw) // 2], place)
            die()

    def noting(handle: int, raw: memoryview) -> int:
        if where == "in a line" and b'"sha256"' in bytes(raw):
            write(handle, raw[: len(raw) // 2])
            die()
        if where == "in a remark" and b'"remark"' in bytes(raw):
            die()
        return write(handle, raw)

    def renaming(old: Path, new: Path) -> None:
        if where == "before the name" and Path(new) == output:
            die()
        rename(old, new)

    os.write, os.rename = noting, renaming
    if where == "in verification":
        from ossia.export import export

        export.compare = die
    with counting_writes(in_a_piece):
        job.run(output)


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_that_is_killed_anywhere_goes_on_and_ends_in_the_same_bytes(
    jobs: dict[str, Job], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = jobs[to]
    (tmp_path / "whole").mkdir()
    with counting_writes(lambda *_: None) as all_writes:
        job.run(tmp_path / "whole" / job.wanted.name)
    late = len(all_writes) - 2
    about_rounding = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  layer ")]
    assert len(about_rounding) == (SHALLOW.num_layers if to == "hf-mxfp4" else 0)
    for where, number in (
        ("in a piece", 2),
        ("in a piece", late),
        ("in a line", 0),
        ("in verification", 0),
        ("before the name", 0),
        *([("in a remark", 0)] if to == "hf-mxfp4" else []),
    ):
        output = tmp_path / f"{where} {number}" / job.wanted.name
        output.parent.mkdir()
        process = forkserver().Process(target=export_and_die, args=(job, output, where, number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, where
        assert [path.name[0] for path in output.parent.iterdir()] == [".", "."], "something has a name already"
        capsys.readouterr()
        with counting_writes(lambda *_: None) as writes:
            job.run(output)
        assert bytes_of(output) == bytes_of(job.wanted), where
        assert [path.name for path in output.parent.iterdir()] == [output.name], where
        said = capsys.readouterr().err
        assert [line for line in said.splitlines() if line.startswith("  layer ")] == about_rounding, where
        if where in ("in verification", "before the name") or number == late:
            assert "are whole and kept" in said
            assert len(writes) < (10 if number == late else 2), where  # the head is written again


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whose file a handle is")
@pytest.mark.parametrize("to", FORMATS)
def test_an_export_takes_its_name_when_every_file_of_it_is_on_the_disk(
    jobs: dict[str, Job], to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after that finds no empty config.json in it."""
    fsync, rename, synced, named = os.fsync, os.rename, set[str](), list[set[str]]()

    def syncing(handle: int) -> None:
        fsync(handle)
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))

    def renaming(old: Path, new: Path) -> None:
        files = [old] if old.is_file() else [old, *old.iterdir()]
        named.append({str(file) for file in files} - synced)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    jobs[to].run(tmp_path / jobs[to].wanted.name)
    assert named == [set()]
    assert str(tmp_path) in synced


@pytest.mark.parametrize("to", ["hf-bf16", "gguf"])
def test_a_place_that_is_taken_meanwhile_costs_no_export(
    jobs: dict[str, Job], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, output = jobs[to], tmp_path / jobs[to].wanted.name
    theirs = output if to == "gguf" else output / "theirs"

    def take(*_: object) -> None:
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("theirs")

    with counting_writes(take), pytest.raises(StoppedError, match=r"can't be named so(.|\n)*kept: the verified export"):
        job.run(output)
    assert theirs.read_text() == "theirs"
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    capsys.readouterr()
    job.run(output)
    assert "are whole and kept" in capsys.readouterr().err
    assert bytes_of(output) == bytes_of(job.wanted)


@pytest.mark.parametrize("to", FORMATS)
def test_the_first_ctrl_c_keeps_what_is_whole(
    jobs: dict[str, Job], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(number: int, *_: object) -> None:
        if number == 30:
            raise KeyboardInterrupt

    output = tmp_path / jobs[to].wanted.name
    with counting_writes(interrupt), pytest.raises(Interrupted, match="the same command goes on from there"):
        jobs[to].run(output)
    jobs[to].run(output)
    assert "are whole and kept" in capsys.readouterr().err
    assert bytes_of(output) == bytes_of(jobs[to].wanted)


# --- what isn't kept --------------------------------------------------------------------------------------------------


def stop_in_the_middle(job: Job, output: Path) -> Path:
    """Returns the file that the weights are in by then."""

    def full(number: int, *_: object) -> None:
        if number == 30:
            raise OSError(28, "No space left on device")

    with counting_writes(full), pytest.raises(StoppedError, match="No space left on device"):
        job.run(output)
    hidden = output.with_name(f".{output.name}.unverified")
    return hidden if hidden.is_file() else hidden / "model.safetensors"


@pytest.mark.parametrize("to", FORMATS)
def test_what_was_changed_or_cut_since_is_written_again(
    jobs: dict[str, Job], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, spoil in (
        ("changed", lambda raw, at: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]),
        ("cut", lambda raw, at: raw[:at]),
        ("emptied", lambda raw, at: b""),
    ):
        output = tmp_path / name / jobs[to].wanted.name
        output.parent.mkdir()
        file = stop_in_the_middle(jobs[to], output)
        journal = output.with_name(f".{output.name}.unverified.journal")
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        _, start, size = [line["region"] for line in lines if "region" in line][-2]
        file.write_bytes(spoil(file.read_bytes(), start + size // 2))
        jobs[to].run(output)
        assert "aren't as they were written" in capsys.readouterr().err, name
        assert bytes_of(output) == bytes_of(jobs[to].wanted), name


@pytest.mark.parametrize("to", FORMATS)
def test_parts_of_another_export_are_never_mixed_in(
    jobs: dict[str, Job], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, name = jobs[to], jobs[to].wanted.name
    other = job.adapter.with_name("adapter-2")
    job.run(tmp_path / name, other)
    wanted = bytes_of(tmp_path / name)
    (tmp_path / "again").mkdir()
    stop_in_the_middle(job, tmp_path / "again" / name)
    capsys.readouterr()
    job.run(tmp_path / "again" / name, other)
    assert "a part of another export (changes differ); it is removed" in capsys.readouterr().err
    assert bytes_of(tmp_path / "again" / name) == wanted


def test_a_source_that_was_written_to_since_is_another(
    jobs: dict[str, Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(jobs["hf-bf16"].model, tmp_path / "model")
    job = Job(tmp_path / "model", jobs["hf-bf16"].adapter, "hf-bf16", tmp_path)
    weights, template = (tmp_path / "model" / name for name in ("model.safetensors", "chat_template.jinja"))
    for what, change in (
        ("weights", lambda: weights.write_bytes(weights.read_bytes()[:-1] + b"\1")),
        ("texts", lambda: template.write_text("other")),
    ):
        stop_in_the_middle(job, tmp_path / "out")
        change()
        job.run(tmp_path / "out")
        assert f"a part of another export ({what} differ)" in capsys.readouterr().err
        job.run(tmp_path / "fresh")
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")
        for folder in ("out", "fresh"):
            shutil.rmtree(tmp_path / folder)


def test_training_rounded_or_not_is_not_the_same_export(jobs: dict[str, Job]) -> None:
    base = Checkpoint.open(jobs["gguf"].model)
    lora = random_lora(base.arch)
    rounded, plain = (Source(base, Changes(lora, qat=qat)).identity(to="gguf") for qat in (True, False))
    assert {key for key in plain if rounded[key] != plain[key]} == {"changes"}


def test_a_journal_that_a_power_cut_spoiled_counts_for_nothing(jobs: dict[str, Job], tmp_path: Path) -> None:
    output = tmp_path / "out"
    stop_in_the_middle(jobs["hf-bf16"], output)
    journal = tmp_path / ".out.unverified.journal"
    journal.write_bytes(journal.read_bytes()[:-40] + bytes(30) + b"\n")
    jobs["hf-bf16"].run(output)
    assert bytes_of(output) == bytes_of(jobs["hf-bf16"].wanted)


def test_two_exports_to_one_place_do_not_meet(jobs: dict[str, Job], tmp_path: Path) -> None:
    def again(number: int, *_: object) -> None:
        if number == 5:
            with pytest.raises(UserError, match="another process is writing there"):
                jobs["hf-bf16"].run(tmp_path / "out")

    with counting_writes(again):
        jobs["hf-bf16"].run(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(jobs["hf-bf16"].wanted)


# --- room -------------------------------------------------------------------------------------------------------------


def test_it_says_how_much_room_it_takes_and_does_not_begin_where_there_is_too_little(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ossia.pieces._free", lambda path: 64 << 20)
    for to, job in jobs.items():
        with pytest.raises(CheckpointError, match=r"No space left on device. It takes 0\.\d+ GB in .*, 0\.07 GB are"):
            job.run(tmp_path / f"x-{to}")
        assert "it takes 0.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# On a disk that another program filled after the check: $1 is where it is mounted; then arguments of the script.
ON_SMALL_DISKS = """
mount -t tmpfs -o size=64m tmpfs "$1" || exit 99
exec "$2" -c "$3" "$1" "$4"
"""
FILLED_UP = """
import json, os, resource, signal, subprocess, sys
from pathlib import Path
import torch
import ossia.pieces
from ossia.errors import StoppedError
from ossia.export import export_model
torch.set_num_threads(1)
disk, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ossia.pieces._free = lambda path: 1 << 60  # what the check saw

def limit(size):
    if os.path.ismount(disk):
        subprocess.run(["mount", "-o", f"remount,size={size or 64 << 20}", str(disk)], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or resource.RLIM_INFINITY, resource.RLIM_INFINITY))

for job in jobs:
    output = disk / job["name"]
    for share in (0.02, 0.3, 0.5, 0.9):
        limit(int(share * job["bytes"]) // 4096 * 4096)
        try:
            export_model(job["model"], to=job["to"], output=output, adapter=job["adapter"])
        except StoppedError as error:
            print(json.dumps([str(error), sorted(path.name for path in disk.iterdir())]))
    limit(0)
    export_model(job["model"], to=job["to"], output=output, adapter=job["adapter"])
    files = [output] if output.is_file() else sorted(output.iterdir())
    print(json.dumps({file.name: file.read_bytes().hex() for file in files}))
    subprocess.run(["rm", "-r", str(output)], check=True)
    print(json.dumps([path.name for path in disk.iterdir()]))
"""


def a_disk_can_be_mounted(folder: Path) -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_disk_that_runs_full_again_and_again_loses_nothing_whole_and_the_export_ends_in_the_same_bytes(
    jobs: dict[str, Job], tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk where none can be mounted."""
    asked = [
        {
            "model": str(job.model),
            "adapter": str(job.adapter),
            "to": to,
            "name": job.wanted.name,
            "bytes": sum(map(len, bytes_of(job.wanted).values())),
        }
        for to, job in jobs.items()
    ]
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", FILLED_UP, str(tmp_path / "disk"), json.dumps(asked)]
    if a_disk_can_be_mounted(tmp_path / "disk"):
        shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_SMALL_DISKS, "sh"]
        command = [*shell, command[3], sys.executable, FILLED_UP, command[4]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for number, job in enumerate(jobs.values()):
        *stops, files, left = lines[6 * number : 6 * number + 6]
        hidden = f".{job.wanted.name}.unverified"
        for message, there in stops:
            assert "No space left on device" in message or "File too large" in message
            assert "run the same command again, it goes on from there" in message
            assert there == [hidden, f"{hidden}.journal"]
        found = {name if job.to != "gguf" else "": bytes.fromhex(text) for name, text in files.items()}
        assert found == bytes_of(job.wanted)
        assert left == []
    for job in jobs.values():
        going_on = [line for line in done.stderr.splitlines() if f".{job.wanted.name}.unverified: " in line]
        kept = [int(line.split(" tensors, ")[0].rpartition(" ")[2]) for line in going_on]
        assert kept == sorted(kept)
        assert kept[-1] > kept[0] > 0
