"""`ossia train` on a disk that runs full: it says so, loses nothing that was saved, and goes on once there is room.

The disk is a real one where the system allows to mount it, a tmpfs in a namespace of the test's own. Elsewhere a limit
on the size of files stands for it, which the system answers with another error at the same call.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ossia import sft
from ossia.config import load_recipe
from ossia.errors import RunError
from ossia.train.state import verify
from tests.e2e.conftest import START
from tests.train.conftest import Outcome, RecipeFor, in_process, outcome

# $1 the recipe, $2 its output folder, $3 where to leave what was said and what was there; then the command
ON_A_SMALL_DISK = """
recipe=$1 run=$2 left=$3; shift 3
mkdir "$run" && mount -t tmpfs -o size="$SIZE" tmpfs "$run" || exit 99
"$@" train "$recipe" 2> "$left/said"; echo $? > "$left/code"
cp -a "$run" "$left/full"
mount -o remount,size=64m "$run"
"$@" train "$recipe" --resume || exit 98
cp -a "$run" "$left/done"
"""
UNDER_A_LIMIT = """
recipe=$1 run=$2 left=$3; shift 3
(ulimit -f 30; exec "$@" train "$recipe" --resume 2> "$left/said"); echo $? > "$left/code"
cp -a "$run" "$left/full"
"$@" train "$recipe" --resume || exit 98
cp -a "$run" "$left/done"
"""


class Silent:
    """A sink for events that nobody looks at."""

    def write(self, event: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class FullDisk(NamedTuple):
    """What a run said when its disk was full, its exit code, the run folder then, and when it was done after all."""

    said: str
    code: int
    full: Path
    done: Path


def a_disk_can_be_mounted(folder: Path) -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    folder.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def fill_up(recipe_for: RecipeFor, tmp_path: Path) -> Callable[[str], FullDisk]:
    """`fill_up(size)`: train on a disk of this size, and again once it is large; the limit has a size of its own."""

    def run_(size: str) -> FullDisk:
        run, left = tmp_path / "run", tmp_path / "left"
        recipe = recipe_for(run)
        left.mkdir()
        arguments = [str(recipe), str(run), str(left), *START]
        if a_disk_can_be_mounted(tmp_path / "probe"):
            script = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"SIZE={size}\n{ON_A_SMALL_DISK}", "sh"]
        else:  # a limit can't tell one checkpoint from the next, so it comes after the second
            assert in_process(recipe, "after a rename", 2) == -signal.SIGKILL
            script = ["bash", "-c", UNDER_A_LIMIT, "bash"]
        done = subprocess.run([*script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return FullDisk((left / "said").read_text(), int((left / "code").read_text()), left / "full", left / "done")

    return run_


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["recipe.yaml", "env.json", "samples.jsonl", "report.html"])
def test_a_small_file_that_a_full_disk_refuses_is_told_and_the_older_one_stays(
    name: str, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_for(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").touch()  # a run was begun there
    (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / f".{name}").symlink_to("/dev/full")  # where it grows before it takes its name
    with pytest.raises(RunError, match=rf"can't save {tmp_path / 'run' / name}: No space left on device\n  needed: "):
        sft.run(recipe, sink=Silent())
    assert (tmp_path / "run" / name).read_text() == ""
    assert not (tmp_path / "run" / f".{name}").exists()


def test_a_disk_that_runs_full_loses_no_checkpoint_and_the_run_goes_on_to_the_same_bytes(
    fill_up: Callable[[str], FullDisk], untouched: Outcome, tmp_path: Path
) -> None:
    found = fill_up("224k")  # room for two checkpoints and what else a run writes, not for a third
    checkpoints = tmp_path / "run" / "checkpoints"
    assert found.code == 2
    assert "Traceback" not in found.said
    assert f"can't save the checkpoint {checkpoints / 'step-00000006'}: " in found.said
    assert f"safe: {checkpoints / 'step-00000004'} and all that it holds" in found.said
    assert "next: free some space there, then run the same command with --resume to go on from step 4" in found.said
    saved = sorted(path.name for path in (found.full / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000004"]
    assert [verify(found.full / "checkpoints" / name) for name in saved] == [None, None]
    assert outcome(found.done) == untouched
