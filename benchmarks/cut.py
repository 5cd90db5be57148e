"""Question: what do a gather and a sum between ranks cost, and a step and a rank's memory with cut weights?

Run: python -m benchmarks.cut      Needs: 2 cores, 12 GiB, 20 minutes      Answer quoted in: docs/parallel.md

Ranks are processes of one thread that talk through gloo over loopback. First collectives alone, of sizes that layers
have; then LoRA runs of a tiny model of 1 GB in MXFP4 (`--layers` and `--experts`: a smaller one) with 1, 2 and 4 ranks:
every rank has all weights (resident), or its part; with parts, the next layer gathered ahead while one computes, or
waited for at once. A step has a pack for each of four ranks. Memory is each rank's largest resident set, of which the
process without a model is told too; the parts of a rank are read from the checkpoint as slices of its file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import peak_resident_bytes, where, write_result

PACKAGES = ("torch", "numpy", "safetensors")
MIB = 1 << 20
RUNS = ((1, "none", True), (2, "none", True), (2, "all", True), (2, "all", False), (4, "all", True), (4, "all", False))
RECIPE = """
model: {model}
device: cpu
weights: {weights}
adapter: {{rank: 4, targets: [attention]}}
data: {{path: {rows}}}
max_length: 128
eval: {{answers: 0}}
train: {{steps: {steps}, tokens_per_step: 512, tokens_per_pack: 128, recompute: always, save_every: 0, threads: 1}}
parallel: {{shard: {shard}}}
output: {output}
"""


def be_rank(rank: int, size: int, port: int, work: Any, told: Any) -> None:
    """A process of `size`, which does `work` and tells what came of it."""
    given = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    told.put((rank, work(rank, size)))


def ranks(size: int, work: Any) -> list[Any]:
    """What `work(rank, size)` gives, of that many processes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = context.SimpleQueue()
    started = [context.Process(target=be_rank, args=(rank, size, port, work, told)) for rank in range(size)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    if any(one.exitcode for one in started):
        raise SystemExit("a rank has failed; its last words are above")
    found = dict(told.get() for _ in started)
    return [found[rank] for rank in range(size)]


def collectives(rank: int, size: int) -> dict[str, float]:
    """Seconds of an exchange of words, and of gathers and sums by their whole size, each the median of seven."""
    import torch

    from ossia.train.ranks.world import joined

    torch.set_num_threads(1)
    found = {}

    def timed(name: str, act: Any) -> None:
        act()
        took = []
        for _ in range(7):
            world.gather(None)
            start = time.perf_counter()
            act()
            took.append(time.perf_counter() - start)
        found[name] = median(took)

    with joined("cpu", timeout_s=120) as world:
        assert world is not None
        timed("words", lambda: world.gather([0.5, None, []]))
        for mib in (16, 64):
            whole = torch.empty(mib * MIB, dtype=torch.uint8)
            part = torch.ones(mib * MIB // size, dtype=torch.uint8)
            timed(f"gather, {mib} MiB", lambda whole=whole, part=part: world.begin_gather(whole, part)())
            sums, own = torch.ones(mib * MIB // 4), torch.empty(mib * MIB // 4 // size)
            timed(f"reduce-scatter, {mib} MiB", lambda own=own, sums=sums: world.begin_sum(own, sums)())
    return found


class Train:
    """A run, as one of its ranks; without `ahead` a gather is waited for where it begins."""

    def __init__(self, recipe: Path, ahead: bool) -> None:
        self.recipe, self.ahead = recipe, ahead

    def __call__(self, rank: int, size: int) -> int:
        import torch

        from ossia import sft
        from ossia.config import load_recipe
        from ossia.train.ranks.world import World

        torch.set_num_threads(1)
        before = peak_resident_bytes()
        if not self.ahead:
            begin = World.begin_gather

            def at_once(world: World, whole: torch.Tensor, part: torch.Tensor) -> Any:
                begin(world, whole, part)()
                return lambda: None

            World.begin_gather = at_once
        sft.run(load_recipe(self.recipe))
        return before


def measure(folder: Path, model: Path, rows: Path, run: tuple[int, str, bool], steps: int) -> dict[str, Any]:
    """One run: a step's seconds and each rank's memory."""
    size, shard, ahead = run
    output = folder / f"{size}-{shard}-{ahead}"
    recipe = output.with_suffix(".yaml")
    weights = "resident" if shard == "none" else "auto"
    text = RECIPE.format(model=model, weights=weights, rows=rows, steps=steps, shard=shard, output=output)
    recipe.write_text(text)
    before = ranks(size, Train(recipe, ahead))
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    taken = [event for event in events if event["event"] == "step"]
    return {
        "ranks": size,
        "shard": shard,
        "gathers_ahead": ahead,
        "step_s": median(event["step_s"] for event in taken[1:]),
        "loss": taken[-1]["loss"],
        "rank_peak_bytes": taken[-1].get("rank_peak_bytes", [taken[-1]["peak_bytes"]]),
        "process_bytes": before,
    }


def make_model(folder: Path, layers: int, experts: int) -> Path:
    """A seeded model in MXFP4, with a small vocabulary, and rows to train on beside it; the rows' file."""
    from ossia.demo.vocabulary import write_vocabulary
    from ossia.model.arch import SHAPES, alternating_layers
    from ossia.model.tiny import make_tiny

    rows = [
        {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "one two " * 20}]}
        for n in range(200)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_experts": experts, "num_layers": layers}
    arch = replace(SHAPES["B1"], **sizes, layer_types=alternating_layers(layers))
    make_tiny(folder / "model", arch, weights="mxfp4", tokenizer=write_vocabulary(rows, folder / "tokenizer.json"))
    return file


def main() -> None:
    """Measure, write benchmarks/results/cut.json, print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    result: dict[str, Any] = {**where(PACKAGES), "config": vars(options), "collectives_s": {}, "runs": []}
    for size in (2, 4):
        result["collectives_s"][size] = ranks(size, collectives)[0]
        print(size, result["collectives_s"][size], file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = make_model(folder, options.layers, options.experts)
        result["model_bytes"] = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        for run in RUNS:
            result["runs"].append(measure(folder, folder / "model", rows, run, options.steps))
            print(json.dumps(result["runs"][-1]), file=sys.stderr, flush=True)
    print(write_result("cut", result))


if __name__ == "__main__":
    main()
