"""A small trained model for tests: rounding changes the routing of random experts, but hardly that of trained ones.

Trained as the demo is, on less, once per content: the folder's name is a hash of the code, the plan and the seed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import ossia
from ossia import sft
from ossia.config import load_recipe
from ossia.demo.conversations import Sizes
from ossia.demo.prepare import Plan, prepare
from ossia.run.trained import MODEL
from ossia.train.events import Event

# Enough for bf16 to predict what float32 predicts on held-out conversations; tests/oracle/test_bf16.py holds that.
FIXTURE_PLAN = Plan(
    sizes=Sizes(train_sorting=2500, train_chats=400, heldout_sorting=30, heldout_chats=30, questions=40),
    steps=200,
    tokens_per_step=1024,
    evaluations=1,
)
KEPT = 3  # contents in a cache folder
_DECIDES = (
    "config",
    "data",
    "demo",
    "export/merge.py",
    "harmony",
    "kernels",
    "model",
    "ops",
    "run",
    "train",
    "sft.py",
)  # what the trained weights depend on


def trained_fixture(cache_dir: Path, *, seed: int = 0, plan: Plan = FIXTURE_PLAN) -> Path:
    """The folder of a trained checkpoint (bf16 layout), its data beside it in `../data`; trained if it isn't there yet.

    cache_dir  kept between test sessions; the contents not asked for longest are deleted from it
    """
    folder = cache_dir / f"demo-{content_hash(plan, seed)}"
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=".demo-", dir=cache_dir))
        try:
            _, recipe_file = prepare(partial, seed=seed, plan=plan)
            sft.run(load_recipe(recipe_file), sink=_Silent())
            shutil.rmtree(partial / "checkpoints")
            try:
                partial.rename(folder)
            except OSError:  # another session may have been faster; its weights are the same
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    folder.touch()
    _forget_longest_unused(cache_dir)
    return folder / MODEL


def content_hash(plan: Plan, seed: int) -> str:
    """16 hex digits over everything that decides the trained weights, as far as this repository holds it."""
    digest = hashlib.sha256(repr((plan, seed)).encode())
    for file in _sources(Path(ossia.__file__).parent):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _sources(package: Path) -> Iterator[Path]:
    for name in _DECIDES:
        path = package / name
        found = sorted(path.rglob("*")) if path.is_dir() else (path,)
        yield from (file for file in found if file.suffix in (".py", ".c", ".h"))


def _forget_longest_unused(cache_dir: Path) -> None:
    """Every change of the code makes another content: a few stay, for whoever goes back and forth."""
    latest_first = sorted(cache_dir.glob("demo-*"), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    for stale in latest_first[KEPT:]:
        shutil.rmtree(stale, ignore_errors=True)  # another session may be deleting it too


class _Silent:
    """A sink that shows nothing."""

    def write(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Nothing more will come."""
