"""The machine that a plan is for: this one, measured in a second, or a GPU that isn't here, from its data sheet.

Rates are a data sheet's: dense bfloat16 products with float32 sums (float16 where a GPU has no bfloat16), and the
memory's bandwidth. What a step reaches of a GPU's products is a share of that, `REACHED`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ossia.errors import UserError
from ossia.model.budget.choose import Memory
from ossia.model.budget.work import DeviceKind, KernelKind

# Of 989 TFLOP/s: an H100 trained the 20b shape at 17,820 tokens/s with 22.5 GFLOP a token, see benchmarks/results/
REACHED = 0.4
_GEN3, _GEN4_HALF, _GEN4, _GEN5 = 12.0, 12.0, 24.0, 50.0  # GB/s that copies from pinned memory reach


@dataclass(frozen=True, slots=True)
class Gpu:
    """A data sheet: memory in GB (10^9 bytes), TFLOP/s, GB/s of its memory and of its way to the machine's."""

    name: str
    memory_gb: float
    tflops: float
    memory_gb_s: float
    host_gb_s: float


_KNOWN = (
    Gpu("T4", 16.1, 65, 320, _GEN3),
    Gpu("V100", 17.2, 125, 900, _GEN3),
    Gpu("3060", 12.9, 25.5, 360, _GEN4),
    Gpu("3080", 10.7, 59.5, 760, _GEN4),
    Gpu("3090", 25.8, 71, 936, _GEN4),
    Gpu("4060", 8.6, 30.2, 272, _GEN4_HALF),
    Gpu("4070", 12.9, 58.3, 504, _GEN4),
    Gpu("4080", 17.2, 97.5, 717, _GEN4),
    Gpu("4090", 25.8, 165, 1008, _GEN4),
    Gpu("5080", 17.2, 112.6, 960, _GEN5),
    Gpu("5090", 34.2, 209.5, 1792, _GEN5),
    Gpu("A10", 25.8, 125, 600, _GEN4),
    Gpu("L4", 25.8, 121, 300, _GEN4),
    Gpu("L40S", 51.5, 362, 864, _GEN4),
    Gpu("A6000", 51.5, 155, 768, _GEN4),
    Gpu("A100-40", 42.9, 312, 1555, _GEN4),
    Gpu("A100-80", 85.9, 312, 2039, _GEN4),
    Gpu("H100", 85.5, 989, 3350, _GEN5),
    Gpu("H200", 151.0, 989, 4800, _GEN5),
    Gpu("B200", 192.0, 2250, 8000, _GEN5),
)
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _KNOWN})


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan has to know.

    memory          of the machine, 0 where it isn't known, and of its GPU
    flops           products of the activations' type a second; source: where it is from
    expand_bytes_s  bytes of expanded experts a second, on a CPU; None: it doesn't count
    host_bytes_s    from the machine's memory to the GPU
    """

    name: str
    kind: DeviceKind
    kernels: KernelKind
    memory: Memory
    flops: float
    source: str
    expand_bytes_s: float | None = None
    host_bytes_s: float | None = None
    process_bytes: int | None = None


def named_gpu(name: str, machine_gb: float | None) -> Machine:
    """A GPU by its name, in a machine of so much free memory (None: it isn't checked). Raises UserError."""
    by_key = {_key(gpu.name): gpu for gpu in _KNOWN}
    found = by_key.get(_key(name)) or by_key.get(_key(name).removeprefix("rtx"))
    if found is None:
        raise UserError(
            f"--gpu {name}: no such GPU\n  allowed: {', '.join(GPUS)}\n"
            "  next: for another one say what it is: --gpu-memory GB --gpu-tflops N --gpu-bandwidth GB/s"
        )
    return _machine(found, machine_gb, f"{found.tflops:g} TFLOP/s of its data sheet")


def described_gpu(memory_gb: float, tflops: float, host_gb_s: float, machine_gb: float | None) -> Machine:
    """A GPU that is described instead."""
    gpu = Gpu(f"a GPU of {memory_gb:g} GB", memory_gb, tflops, 0.0, host_gb_s)
    return _machine(gpu, machine_gb, f"{tflops:g} TFLOP/s, as given")


def _machine(gpu: Gpu, machine_gb: float | None, source: str) -> Machine:
    free = int((machine_gb or 0) * 1e9)
    total = int(gpu.memory_gb * 1e9)
    return Machine(
        gpu.name,
        "cuda",
        "triton",
        Memory(free, free, total, total),
        gpu.tflops * 1e12 * REACHED,
        f"{REACHED:.0%} of {source}, the share that an H100 reached",
        host_bytes_s=gpu.host_gb_s * 1e9,
    )


def _key(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").removeprefix("nvidia").removeprefix("geforce")


def here(device: str, dtype: str, threads: int | None) -> Machine:
    """This machine: a GPU that torch finds, or the CPU, whose products and expansion are timed for half a second."""
    import torch

    from ossia.kernels import pick_kernels
    from ossia.model.open import DTYPES, memory_of
    from ossia.ops.memory import resident_bytes

    if threads is not None:
        torch.set_num_threads(threads)
    gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda" if gpu else "cpu")
    kernels = pick_kernels(place, DTYPES[dtype])
    if gpu:
        name = torch.cuda.get_device_name(place)
        known = next((g for g in reversed(_KNOWN) if _key(g.name) in _key(name)), None)
        tflops = known.tflops if known else 0.0
        source = f"{tflops:g} TFLOP/s of its data sheet" if known else "an unknown rate"
        return Machine(
            name, "cuda", kernels, memory_of(place), tflops * 1e12 * REACHED,
            f"{REACHED:.0%} of {source}, the share that an H100 reached",
            host_bytes_s=(known.host_gb_s if known else _GEN4) * 1e9,
        )  # fmt: skip
    flops, expand = _time_products(DTYPES[dtype]), _time_expanding(DTYPES[dtype])
    num = torch.get_num_threads()
    words = f"{num} thread{'s' if num > 1 else ''} of {len(os.sched_getaffinity(0))}"
    return Machine(
        f"CPU, {words}", "cpu", kernels, memory_of(place), flops,
        f"products at {flops / 1e9:,.0f} GFLOP/s and experts expanded at {expand / 1e9:.1f} GB/s, timed here just now",
        expand_bytes_s=expand, process_bytes=resident_bytes(),
    )  # fmt: skip


def _time_products(dtype: object) -> float:
    """FLOP/s of a product of an expert's size."""
    import torch

    x, w = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    return 2 * 256 * 1024 * 1024 / _best(lambda: torch.mm(x, w))


def _time_expanding(dtype: object) -> float:
    """Bytes of expanded weights a second."""
    import torch

    from ossia.ops.mxfp4 import dequantize_mxfp4

    blocks, scales = torch.zeros(1, 2048, 32, 16, dtype=torch.uint8), torch.full((1, 2048, 32), 127, dtype=torch.uint8)
    out = dequantize_mxfp4(blocks, scales, dtype)
    return out.nbytes / _best(lambda: dequantize_mxfp4(blocks, scales, dtype))


def _best(call, seconds: float = 0.2) -> float:
    """Seconds of the quickest of the calls that fit into `seconds`."""
    call()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
