"""Question: is one commit slower than another?

Run: python -m benchmarks.guard main      Needs: git, 2 minutes of a core      Quoted in: AGENTS.md

Both commits are checked out beside each other and do the same work in turn (A B A B ...), each time in a process of its
own: `ossia train` on a small model of shape B1, and `ossia generate` with the demo's shape. Compared is the processor's
time, of all threads, which other work on the machine hardly changes; of training, that of the steps after the first two
as well, which is in the run's own events. The figure is the median of the pairs' ratios. It ends with 1 where one is
above `--most`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.common import ROOT

MOST = 1.10  # a slowdown that may still be noise on a machine that does other work as well


@dataclass(frozen=True)
class Size:
    """Of the work: training steps of so many tokens, prompts, and tokens of an answer."""

    shape: str = "B1"
    steps: int = 8
    tokens: int = 1024
    prompts: int = 64
    answer: int = 128


@dataclass(frozen=True)
class Ratio:
    """New by old: the median of the pairs, the least and the largest."""

    name: str
    middle: float
    least: float
    largest: float

    @classmethod
    def of(cls, name: str, pairs: list[tuple[float, float]]) -> Ratio:
        """pairs  (old, new) of each turn, in seconds"""
        ratios = [new / old for old, new in pairs]
        return cls(name, median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.name:<16}{self.middle:.3f}   ({self.least:.3f} to {self.largest:.3f})"


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's tree in a folder that goes again."""
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def prepare(scratch: Path, size: Size) -> None:
    """A small vocabulary, two models, rows to train on and prompts: made once, for both commits."""
    from ossia.demo.prepare import DATA, START, Plan
    from ossia.demo.prepare import prepare as prepare_demo
    from ossia.model.arch import SHAPES
    from ossia.model.tiny import make_tiny

    prepare_demo(scratch / "demo", seed=0, plan=Plan())
    make_tiny(scratch / "train", SHAPES[size.shape], tokenizer=scratch / "demo" / START)
    rows = (scratch / "demo" / DATA / "train.jsonl").read_text().splitlines()
    (scratch / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (scratch / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"Sort {n}, 3 and 8."}]}) + "\n"
            for n in range(size.prompts)
        )
    )
    (scratch / "train.yaml").write_text(
        f"model: {scratch / 'train'}\nweights: bf16\nadapter: {{rank: 16}}\ndata: {scratch / 'rows.jsonl'}\n"
        f"max_length: {size.tokens}\neval: {{answers: 0}}\n"
        f"train: {{steps: {size.steps}, tokens_per_step: {size.tokens}, threads: 1, save_every: 0}}\n"
    )


def spent(tree: Path, words: list[str]) -> float:
    """Processor seconds of an `ossia` command of a tree."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ossia", *words], cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{tree.name}: ossia {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}:\n{said}"
        )
    return usage.ru_utime + usage.ru_stime


def turn(tree: Path, scratch: Path, size: Size) -> dict[str, float]:
    """One of everything, in one tree: seconds by name."""
    with TemporaryDirectory(dir=scratch) as out:
        run = Path(out) / "run"
        train = spent(tree, ["train", str(scratch / "train.yaml"), f"output={run}"])
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        steps = [event["step_s"] for event in events if event["event"] == "step"]
        answers = ("--out", f"{out}/answers.jsonl", "--max-tokens", str(size.answer), "--temperature", "0")
        model = str(scratch / "demo" / "start")
        decode = spent(tree, ["generate", model, "--in", str(scratch / "prompts.jsonl"), *answers])
    return {"train": train, "a training step": median(steps[2:] or steps), "generate": decode}


def compare(old: str, new: str, repeats: int, size: Size, *, warm: bool = True) -> list[Ratio]:
    """The ratios of two commits, after a turn of each that isn't counted where `warm`."""
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare(scratch, size)
        with checked_out(old, scratch / "old") as before, checked_out(new, scratch / "new") as after:
            turns = [(turn(before, scratch, size), turn(after, scratch, size)) for _ in range(repeats + warm)][warm:]
    return [Ratio.of(name, [(a[name], b[name]) for a, b in turns]) for name in turns[0][0]]


def main() -> None:
    """Compare, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="the commit to compare with")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=float, default=MOST, help="the ratio above which it fails")
    parser.add_argument("--no-warmup", action="store_true", help="count the first turn too")
    for name, default in vars(Size()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    size = Size(**{name: vars(options)[name] for name in vars(Size())})
    ratios = compare(options.old, options.new, options.repeats, size, warm=not options.no_warmup)
    print(f"{'new / old':<16}median of {options.repeats}, least to largest")
    for ratio in ratios:
        print(ratio)
    if slow := [ratio.name for ratio in ratios if ratio.middle > options.most]:
        raise SystemExit(f"slower by more than {options.most - 1:.0%}: {', '.join(slow)}")


if __name__ == "__main__":
    main()
