"""Where the ranks of a run go on: `find_start` of rank 0, in which all take part, as each host may have its own disk.

Rank 0 proposes a checkpoint of its own folder, newest first. For a sharded one every rank reads a share of the files in
its host's folder and says which are what the manifest says: the checkpoint is whole if each file is so somewhere. A
file that is wrong everywhere spoils it, and the one before is tried; one that nobody sees may be on a host that isn't
there, which is the user's to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ossia.disk import sync_to_disk
from ossia.train.loop import find_start
from ossia.train.shards.hosts import keepers
from ossia.train.state import (
    MANIFEST,
    STATE,
    SavedState,
    checkpoint_path,
    checkpoint_paths,
    files_of,
    is_sharded,
    missing,
    partial_path,
    read_state,
    require_none_set_aside,
    set_aside,
    step_of,
    verify,
)

if TYPE_CHECKING:
    from ossia.train.ranks.world import World

Seen = dict[int, frozenset[str]]


def find_start_together(world: World, run: Path, *, resume: bool, say: Callable[[str], None]) -> SavedState | None:
    """`train.loop.find_start` by all ranks at once: the same checkpoint on each, or None to begin at step 0."""
    if world.leads:
        saved = find_start(run, resume=resume, say=say, newest=lambda run, say: _newest(world, run, say))
        world.from_first(["go on", None if saved is None else [saved.step, saved.progress]])
        return saved
    seen: Seen = {}
    while True:
        asked, *what = world.from_first(None)
        if asked == "check":
            seen, _ = _check(world, run, *what)
        elif what[0] is None:
            return None
        else:
            step, progress = what[0]
            return SavedState(checkpoint_path(run, step), step, progress, seen or None)


def _newest(world: World, run: Path, say: Callable[[str], None]) -> SavedState | None:
    """Rank 0's part, while the others do as it asks."""
    for path in reversed(checkpoint_paths(run)):
        seen: Seen = {}
        with world.busy("checking a checkpoint"):
            problem = verify(path, ()) if is_sharded(path) else verify(path)
        if problem is None and is_sharded(path):
            manifest = (path / MANIFEST).read_text()
            world.from_first(["check", step_of(path), manifest])
            seen, problem = _check(world, run, step_of(path), manifest)
        if problem is None:
            return SavedState(path, step_of(path), read_state(path)["progress"], seen or None)
        say(f"{path}: {problem}; set aside as {set_aside(path).name}, trying the checkpoint before it")
    require_none_set_aside(run)
    return None


def _check(world: World, run: Path, step: int, manifest: str) -> tuple[Seen, str | None]:
    """Which files of a checkpoint are whole in which run folder, by its keeper; and what is wrong, in words.

    Raises  RunError for files that nobody sees
    """
    keeper, place = keepers(world, run), checkpoint_path(run, step)
    if keeper[world.rank] == world.rank:
        _take_up(place, manifest)
    world.gather(None)
    files = world.from_first(files_of(place))
    with_me = [rank for rank in range(world.size) if keeper[rank] == keeper[world.rank]]
    found: dict[str, str | None] = {}
    with world.busy("checking a checkpoint"):
        for name in sorted(files)[with_me.index(world.rank) :: len(with_me)]:
            if (place / name).exists():
                found[name] = verify(place, (name,))
    seen: dict[int, set[str]] = {rank: set() for rank in sorted(set(keeper))}
    wrong: dict[str, str] = {}
    for rank, said in enumerate(world.gather(found)):
        seen[keeper[rank]] |= {name for name, problem in said.items() if problem is None}
        wrong |= {name: problem for name, problem in said.items() if problem is not None}
    lacking = [name for name in files if not any(name in names for names in seen.values())]
    if spoilt := [name for name in lacking if name in wrong]:
        return {}, wrong[spoilt[0]]
    if lacking and world.leads:  # of whom the others hear it
        raise missing(place, lacking)
    if STATE not in seen[0]:
        _give_state(world, place, min(rank for rank, names in seen.items() if STATE in names))
        seen[0].add(STATE)
    return {rank: frozenset(names) for rank, names in seen.items()}, None


def _give_state(world: World, place: Path, source: int) -> None:
    """To rank 0, which reads the data's position there before any file is sent: another host's whole state.json."""
    text = world.gather((place / STATE).read_text() if world.rank == source else None)[source]
    if world.leads:
        (place / STATE).write_text(text)
        sync_to_disk(place / STATE)


def _take_up(place: Path, manifest: str) -> None:
    """On a host with its own disk: what is there of a checkpoint that rank 0 has, under its own name; and the manifest.

    A run that ended between rank 0's rename and this host's has left it under the hidden one.
    """
    partial = partial_path(place)
    if place.exists() and _other(place / MANIFEST, manifest):
        set_aside(place)
    if not place.exists() and partial.exists() and not _other(partial / MANIFEST, manifest):
        os.rename(partial, place)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / MANIFEST).exists():
        (place / MANIFEST).write_text(manifest)


def _other(file: Path, manifest: str) -> bool:
    """Whether this is the manifest of another checkpoint; where there is none, what the files are decides."""
    return file.exists() and file.read_text() != manifest
