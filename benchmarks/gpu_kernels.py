"""Question: how near to the memory's speed are the kernels of a decode step, each by itself?

Run: python -m benchmarks.gpu_kernels      Needs: a CUDA GPU of 16 GB, Triton      Quoted in: docs/gpu.md

Experts and attention of the 20b shape over random weights and a random cache. A case is a CUDA graph that goes through
several layers, whose weights are each other's turn, so the L2 cache keeps none; times are the profiler's, a kernel's
mean over layers. Bytes are what has to be read at least: the chosen experts' packed weights, or keys and values.
`--sweep` tries other shapes of tiles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.common import where, write_result
from ossia.kernels.gpu import decode, decode_dense, decode_experts
from ossia.model.arch import SHAPES

DEVICE, SEED = torch.device("cuda"), 0
LAYERS, REPEATS, CONTEXT = 4, 5, 4096
BATCHES = (1, 2, 4, 8, 64, 256)
SHAPES_OF_TILES = (
    (64, 32, 4, 4), (64, 64, 3, 4), (128, 32, 3, 4), (128, 32, 4, 4), (128, 32, 4, 8), (128, 64, 2, 4), (128, 64, 3, 8),
)  # fmt: skip
SHAPES_ALONE = ((32, 16), (16, 16), (8, 16), (16, 32), (8, 32), (32, 8), (16, 8))
SHAPES_OF_DENSE = ((8, 512), (4, 512), (4, 1024), (2, 1024), (8, 1024), (2, 4096))
ARCH = SHAPES["20b"]
Layer = tuple[decode_experts.Projection, decode_experts.Projection]


def layers(rank: int | None) -> list[Layer]:
    """Random packed experts of some layers."""
    drawn = torch.Generator(device=DEVICE).manual_seed(SEED)
    hidden, size, experts = ARCH.hidden_size, ARCH.intermediate_size, ARCH.num_experts

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=drawn).bfloat16() / 10

    def projection(fan_out: int, fan_in: int) -> decode_experts.Projection:
        blocks = torch.randint(256, (experts, fan_out, fan_in // 32, 16), device=DEVICE, generator=drawn)
        scales = torch.randint(117, 120, blocks.shape[:3], device=DEVICE, generator=drawn)
        adapter = (floats(experts, rank, fan_in), floats(experts, fan_out, rank)) if rank else (None, None)
        return blocks.to(torch.uint8), scales.to(torch.uint8), floats(experts, fan_out), *adapter

    return [(projection(2 * size, hidden), projection(hidden, size)) for _ in range(LAYERS)]


def times(step: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel in a layer, while a CUDA graph of `step` is replayed."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            graph.replay()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    return {event.key: event.device_time_total / REPEATS / LAYERS for event in events if event.device_time_total}


def report(name: str, found: dict[str, float], read_bytes: dict[str, int]) -> dict[str, Any]:
    """Microseconds and GB/s by kernel; kernels are found by the beginning of their names."""
    kernels: dict[str, dict[str, float]] = {}
    for kernel, taken in sorted(found.items(), key=lambda item: -item[1]):
        kernels[kernel] = {"us": round(taken, 2)}
        for prefix, count in read_bytes.items():
            if kernel.startswith(prefix):
                kernels[kernel]["gb_per_s"] = round(count / taken / 1e3)
    total = sum(found.values())
    shown = ", ".join(f"{kernel[:24]} {line}" for kernel, line in list(kernels.items())[:5])
    print(f"{name}: {total:.1f} us a layer: {shown}", flush=True)
    return {"us": total, "gb_per_s": sum(read_bytes.values()) / total / 1e3, "kernels": kernels}


def experts(batch: int, weights: list[Layer], alone: bool | None = None) -> dict[str, Any]:
    """The mixture of a batch whose tokens choose at random."""
    drawn = torch.Generator(device=DEVICE).manual_seed(batch)
    x = torch.randn(batch, ARCH.hidden_size, device=DEVICE, generator=drawn).bfloat16()
    logits = torch.randn(LAYERS, batch, ARCH.num_experts, device=DEVICE, generator=drawn).bfloat16()

    def step() -> list[Tensor]:
        limits = ARCH.swiglu_limit, ARCH.swiglu_alpha
        each = zip(logits, weights, strict=True)
        return [
            decode_experts.mixture(x, x, mine, ARCH.experts_per_token, *layer, *limits, alone=alone, wide=False)[1]
            for mine, layer in each
        ]

    chosen = sum(len(used.unique()) for used in step()) / LAYERS
    row_bytes = ARCH.hidden_size // 2 + ARCH.hidden_size // 32
    gate_up = int(chosen * 2 * ARCH.intermediate_size * row_bytes)
    found = times(step)
    rank = weights[0][0][3]
    name = f"experts, batch {batch}, {'alone' if alone else 'tiles' if alone is not None else 'auto'}"
    name += "" if rank is None else f", adapter of rank {rank.shape[1]}"
    return report(name, found, {"_gate_up": gate_up, "_down": gate_up // 2})


def attention(batch: int, window: int | None) -> dict[str, Any]:
    """One token a sequence over a cache whose blocks lie in no order."""
    block = window or 64
    blocks = CONTEXT // block if window is None else 1
    drawn = torch.Generator(device=DEVICE).manual_seed(batch)
    shape = ((batch * blocks + 1) * block, 2 * ARCH.num_kv_heads, ARCH.head_dim)
    pools = [torch.randn(shape, device=DEVICE, generator=drawn, dtype=torch.bfloat16) for _ in range(LAYERS)]
    table = torch.randperm(batch * blocks, device=DEVICE, generator=drawn).view(batch, blocks).to(torch.int32) + 1
    query = torch.randn(batch, ARCH.num_heads, ARCH.head_dim, device=DEVICE, generator=drawn).bfloat16()
    row, position = torch.arange(batch, device=DEVICE), torch.full((batch,), CONTEXT - 1, device=DEVICE)
    sinks = torch.zeros(ARCH.num_heads, device=DEVICE, dtype=torch.bfloat16)

    def step() -> None:
        for pool in pools:
            scale = ARCH.head_dim**-0.5
            decode.attend(query, pool, table, row, position, sinks, block=block, window=window, scale=scale)

    read = batch * (window or CONTEXT) * 2 * ARCH.num_kv_heads * ARCH.head_dim * 2
    return report(f"attention, batch {batch}, window {window}", times(step), {"_attend_part": read})


def dense() -> dict[str, Any]:
    """What stands around the experts for one token."""
    drawn = torch.Generator(device=DEVICE).manual_seed(SEED)
    hidden, heads, kv, size = ARCH.hidden_size, ARCH.num_heads, ARCH.num_kv_heads, ARCH.head_dim

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, generator=drawn).bfloat16() / 10

    def linear(fan_out: int, fan_in: int) -> decode_dense.Dense:
        return floats(fan_out, fan_in), floats(fan_out), None, None

    layers = [
        (decode_dense.Qkv.of(*(linear(count * size, hidden) for count in (heads, kv, kv))),
         linear(hidden, heads * size), linear(ARCH.num_experts, hidden))
        for _ in range(LAYERS)
    ]  # fmt: skip
    x, norm, wide, turned = floats(1, hidden), floats(hidden), floats(1, heads * size), floats(1, size // 2)
    slot, pool = torch.zeros(1, dtype=torch.int64, device=DEVICE), floats(1, 2 * kv, size)

    def step() -> None:
        for qkv, output, router in layers:
            decode_dense.qkv(x, norm, 1e-5, qkv, turned, turned, slot, pool)
            decode_dense.add_product(x, wide, output)
            decode_dense.logits(x, norm, 1e-5, router)

    read = {"_qkv": (heads + 2 * kv) * size * hidden * 2, "_add_product": heads * size * hidden * 2}
    return report("dense, batch 1", times(step), read)


def sweep(weights: list[Layer]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other shapes of tiles and of what goes alone. A shape that doesn't fit is shown as such."""
    for shape in SHAPES_OF_DENSE:
        decode_dense.PAIRS, decode_dense.BLOCK = shape
        decode_dense.ROWS = decode_dense.PAIRS
        print(shape, end=" ")
        yield f"dense {shape}", dense()
    for shape in SHAPES_ALONE:
        decode_experts.ALONE_ROWS, decode_experts.ALONE_GROUPS = shape
        print(shape, end=" ")
        yield f"alone {shape}", experts(1, weights, alone=True)
    for batch, tokens in ((1, 16), (64, 16), (256, 64), (256, 32)):
        for shape in SHAPES_OF_TILES:
            decode_experts.TILES = dict.fromkeys((16, 32, 64), shape)
            decode_experts.MOST_TOKENS = decode_experts.FIRST_TILE = tokens
            print(tokens, shape, end=" ")
            try:
                yield f"tile {batch} {tokens} {shape}", experts(batch, weights, alone=False)
            except OutOfResources as error:
                print(f"failed: {error}".partition("\n")[0])


def cases(batches: Iterable[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The experts each way and with an adapter, and attention of both kinds."""
    weights = layers(None)
    for batch in batches:
        for alone in (True, False) if batch <= 8 else (False,):
            yield f"experts-{batch}-{'alone' if alone else 'tiles'}", experts(batch, weights, alone)
    del weights
    yield "dense-1", dense()
    weights = layers(8)
    for batch in (1, 64):
        yield f"experts-{batch}-adapter", experts(batch, weights)
    for batch in batches:
        for window in (None, 128):
            yield f"attention-{batch}-{window}", attention(batch, window)


def main() -> None:
    """Every case, or every shape; a line each, and a file of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    found = {"where": where(("torch", "numpy", "triton")) | {"gpu": torch.cuda.get_device_name()}, "cases": {}}
    with torch.inference_mode():
        for name, measured in sweep(layers(None)) if options.sweep else cases(options.batch or BATCHES):
            found["cases"][name] = measured
    print(json.dumps({name: round(line["us"], 1) for name, line in found["cases"].items()}))
    write_result("gpu-kernels-sweep" if options.sweep else "gpu-kernels", found)


if __name__ == "__main__":
    main()
