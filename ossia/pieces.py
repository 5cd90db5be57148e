"""Large files written region by region, so that a writer that stopped, killed or out of room, goes on where it was.

A region (a tensor's bytes) comes in pieces, each put to its place in its file. When its last byte is handed to the
system, a line of the journal beside the target says so, with the sha256 of the region; the journal's first line says
what is being written (`identity`). Who goes on reads every region back and keeps what has its checksum, so it doesn't
matter what a full disk, a kill or a power cut left: nothing but whole regions of the very same export is kept.
The target has a hidden name, and it is the caller who gives it its own and ends the journal. No torch here: bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from ossia.disk import locked
from ossia.errors import CheckpointError, StoppedError, UserError

_BLOCK = 1 << 22  # bytes read at a time to be checked
MARGIN_BYTES = 64 << 20  # beside the regions: tokenizer, configs, the journal, file system

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


class Region(NamedTuple):
    """Where bytes belong: a file below the target ("" where the target is the file), the first byte, and how many."""

    file: str
    start: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.num_bytes


@dataclass(slots=True)
class Journal:
    """Which regions of a target are whole.

    target  the hidden folder or file that grows
    whole   what an earlier writer left: its regions by name, each read and found to be what was written
    remarks what was remarked about the writing, by then and before
    """

    target: Path
    whole: dict[str, Region]
    remarks: dict[str, float]
    _say: Callable[[str], None] = field(repr=False)
    _file: int = field(repr=False)

    @classmethod
    def open(cls, target: Path, identity: Mapping[str, str], say: Callable[[str], None]) -> Self:
        """Take up what was left, if it is a part of this very export, or else begin anew; for this process alone.

        identity  what is written, from what, with which options: all that decides about its bytes
        say       is told what is kept, and what isn't and why
        Raises    UserError while another process writes there; CheckpointError if nothing can be written there
        """
        try:
            return cls._open(target, identity, say)
        except OSError as error:
            raise CheckpointError(
                f"{target}: could not be begun: {error.strerror}; make room or name another --output"
            ) from error

    @classmethod
    def _open(cls, target: Path, identity: Mapping[str, str], say: Callable[[str], None]) -> Self:
        path = _journal_of(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with ExitStack() as on_failure:
            on_failure.callback(os.close, handle)
            if not locked(handle):
                raise UserError(f"{target}: another process is writing there; let it end, or name another --output")
            lines = _whole_lines(handle)
            before = lines[0].get("writing") if lines else None
            if before is not None and before != identity:
                differing = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
                say(f"{target} holds a part of another export ({', '.join(differing)} differ); it is removed")
            if before != identity:
                _remove(target)
                os.ftruncate(handle, 0)
                _write(handle, json.dumps({"writing": dict(identity)}).encode() + b"\n")
                lines = []
            remarks = {line["remark"]: line["value"] for line in lines[1:] if "remark" in line}
            noted = {line["name"]: (Region(*line["region"]), line["sha256"]) for line in lines[1:] if "name" in line}
            whole = _checked(target, noted)
            on_failure.pop_all()
        if noted:
            kept = sum(region.num_bytes for region in whole.values())
            lost = "" if len(whole) == len(noted) else f"; {len(noted) - len(whole)} aren't as they were written"
            say(f"going on with {target}: {len(whole):,} tensors, {kept / 1e9:.2f} GB, are whole and kept{lost}")
        return cls(target, whole, remarks, say, handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self._file)  # lets go of the lock

    def note(self, name: str, region: Region, sha256: str) -> None:
        """Write down that a region is whole. Raises OSError."""
        _write(self._file, json.dumps({"name": name, "region": region, "sha256": sha256}).encode() + b"\n")

    def remark(self, what: str, value: float) -> None:
        """Write down a number for whoever goes on. Raises OSError."""
        self.remarks[what] = value
        _write(self._file, json.dumps({"remark": what, "value": value}).encode() + b"\n")

    def remove(self, *, and_target: bool) -> None:
        """End it: the target has its own name now, or is given up."""
        if and_target:
            _remove(self.target)
        _journal_of(self.target).unlink(missing_ok=True)

    @contextmanager
    def growing(self, total_bytes: int) -> Iterator[None]:
        """Around the writing: says how much room it takes, and what to do where a disk refuses.

        total_bytes  of all regions
        Raises       CheckpointError if there isn't enough room to begin; StoppedError if there isn't enough to go on,
                     or for an OSError within
        """
        self._say(f"it takes {self._room(total_bytes)} there")
        try:
            if _free(self.target) < self._needed(total_bytes):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield
        except OSError as error:
            what = f"{self.target}: could not be written: {error.strerror}. It takes {self._room(total_bytes)} there"
            if not self.target.exists():
                raise CheckpointError(f"{what}\n  next: make room or name another --output") from error
            raise StoppedError(
                f"{what}\n"
                "  kept: every tensor that is whole\n"
                "  next: make room and run the same command again, it goes on from there; or give it up and remove\n"
                f"  {self.target} and {_journal_of(self.target).name}"
            ) from error

    def _needed(self, total_bytes: int) -> int:
        return max(0, total_bytes - _allocated(self.target)) + MARGIN_BYTES

    def _room(self, total_bytes: int) -> str:
        more = " more" if self.target.exists() else ""
        needed, free = self._needed(total_bytes) / 1e9, _free(self.target) / 1e9
        return f"{needed:.2f} GB{more} in {self.target.parent}, {free:.2f} GB are free"


class RegionWriter:
    """Puts pieces to their places in files, and notes in a journal, where there is one, each region that is whole."""

    def __init__(
        self,
        root: Path,
        heads: Mapping[str, bytes],
        regions: Mapping[str, Region],
        *,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open the files and write their heads.

        root     the folder that the regions' files are in, or the file itself
        heads    of each file what it begins with
        regions  every region by its name; what the journal knows as whole needs no pieces
        Raises   OSError
        """
        self._regions, self._journal, self._progress = regions, journal, progress
        self._whole: set[str] = set()
        for name, region in {} if journal is None else journal.whole.items():
            assert regions[name] == region, f"{name}: {region} before, {regions[name]} now"
            self._whole.add(name)
        self._total = sum(region.num_bytes for region in regions.values())
        self._done = sum(regions[name].num_bytes for name in self._whole)
        self._written: dict[str, int] = {}
        self._sums: dict[str, Any] = {}
        self._files: dict[str, int] = {}
        self._beside = ThreadPoolExecutor(1)  # checksums are taken while the system copies
        with ExitStack() as on_failure:
            on_failure.callback(self._close)
            for file, head in heads.items():
                self._files[file] = os.open(root / file if file else root, os.O_WRONLY | os.O_CREAT, 0o644)
                _write(self._files[file], head, 0)
            on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._close()

    def write(self, name: str, raw: memoryview) -> None:
        """The next piece of a region. Raises OSError."""
        region, at = self._regions[name], self._written.get(name, 0)
        assert at + raw.nbytes <= region.num_bytes, f"{name}: more than its {region.num_bytes} bytes"
        assert name not in self._whole, f"{name} is whole already"
        summed = None
        if self._journal is not None:
            summed = self._beside.submit(self._sums.setdefault(name, hashlib.sha256()).update, raw)
        _write(self._files[region.file], raw, region.start + at)
        self._written[name] = at + raw.nbytes
        if summed is not None:
            summed.result()
        if at + raw.nbytes == region.num_bytes:
            self._whole.add(name)
            if self._journal is not None:
                self._journal.note(name, region, self._sums.pop(name).hexdigest())
        self._done += raw.nbytes
        if self._progress:
            self._progress(self._done, self._total)

    def finish(self, ends: Mapping[str, int] | None = None) -> None:
        """Have everything on the disk.

        ends    of files that end behind their last region
        Raises  OSError
        """
        short = [name for name in self._regions if name not in self._whole]
        assert not short, f"not written, or not to the end: {short}"
        for file, handle in self._files.items():
            end = max(region.end for region in self._regions.values() if region.file == file)
            os.ftruncate(handle, max(end, (ends or {}).get(file, 0)))
            os.fsync(handle)

    def _close(self) -> None:
        self._beside.shutdown()
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def _write(handle: int, raw: bytes | memoryview, at: int | None = None) -> None:
    """All of it, at a place or (None) at the end. Raises OSError."""
    left = memoryview(raw).cast("B")
    while left:
        done = os.write(handle, left) if at is None else os.pwrite(handle, left, at)
        left, at = left[done:], None if at is None else at + done


def _journal_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.journal")


def _whole_lines(handle: int) -> list[dict[str, Any]]:
    """The lines of a journal; one that was torn is cut off, and all where the first isn't one."""
    with os.fdopen(os.dup(handle), "rb") as file:
        file.seek(0)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    os.ftruncate(handle, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:  # a power cut can leave zeros
        return []


def _checked(target: Path, noted: Mapping[str, tuple[Region, str]]) -> dict[str, Region]:
    """The regions whose bytes are what the journal says."""

    def is_whole(item: tuple[str, tuple[Region, str]]) -> bool:
        _, (region, sha256) = item
        with suppress(FileNotFoundError):
            return _sha256(target / region.file if region.file else target, region) == sha256
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(is_whole, noted.items())
        return {name: region for (name, (region, _)), whole in zip(noted.items(), found, strict=True) if whole}


def _sha256(file: Path, region: Region) -> str:
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, region.num_bytes))), region.num_bytes
    with file.open("rb", buffering=0) as handle:
        handle.seek(region.start)
        while left and (count := handle.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest() if not left else ""


def _allocated(target: Path) -> int:
    """Bytes of the disk that a file or a folder's files have already."""
    files: Collection[Path] = [target] if target.is_file() else list(target.glob("*"))
    return sum(file.stat().st_blocks * 512 for file in files)


def _free(target: Path) -> int:
    return shutil.disk_usage(next(place for place in target.parents if place.exists())).free


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
