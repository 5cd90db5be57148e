"""Question: how long does it take to merge an adapter into a layer of gpt-oss-20b and to round its experts to MXFP4?

Run: python -m benchmarks.round_mxfp4      Needs: 2 cores, 2 GB      Answer quoted in: docs/benchmarks.md

One layer's experts in the released shape (32 of 5760 x 2880 and of 2880 x 2880), random bytes in MXFP4, and an adapter
of rank 16 on all of them, expert by expert as an export goes. Rounding alone beside it, in C and in torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.common import peak_resident_bytes, where, write_result
from ossia.model.arch import SHAPES
from ossia.model.packed import Factors, Packed, merged_experts, pieces, rounded_experts
from ossia.ops.mxfp4 import quantize_mxfp4

RANK = 16


def layer() -> list[tuple[Packed, Factors]]:
    """Experts and adapter of both projections."""
    arch, generator = SHAPES["20b"], torch.Generator().manual_seed(0)
    found = []
    for fan_out, fan_in in ((2 * arch.intermediate_size, arch.hidden_size), (arch.hidden_size, arch.intermediate_size)):
        shape = (arch.num_experts, fan_out, fan_in // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(116, 124, shape, dtype=torch.uint8, generator=generator)
        a = torch.randn(arch.num_experts, RANK, fan_in, generator=generator) / fan_in**0.5
        b = torch.randn(arch.num_experts, fan_out, RANK, generator=generator) * 0.01
        found.append((Packed(blocks, scales), Factors(a, b, 2.0)))
    return found


def seconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians of the wall's time and of the CPU's."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall_s": median(walls), "cpu_s": median(cpus)}


def main() -> None:
    """Measure, write benchmarks/results/round_mxfp4.json, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experts = layer()

    def whole() -> None:
        for base, delta in experts:
            for one in pieces(base, delta, at_once=1):
                rounded_experts(*one, merged_experts(*one))

    weights = sum(base.scales.numel() * 32 for base, _ in experts)
    one = merged_experts(*next(pieces(*experts[0], at_once=1)))
    whole()
    peak = peak_resident_bytes()
    found = {
        "a layer, merged and rounded": seconds(whole, options.repeats),
        "rounding alone, in C": seconds(lambda: quantize_mxfp4(one), options.repeats),
        "rounding alone, in torch": seconds(lambda: quantize_mxfp4(one, kernels="torch"), options.repeats),
    }
    for name in list(found)[1:]:  # measured on one expert
        found[name] = {key: value * weights / one.numel() for key, value in found[name].items()}
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "config": {"shape": "20b", "rank": RANK, "weights": weights, "threads": options.threads},
        "repeats": options.repeats,
        "seconds": found,
        "peak_bytes": peak,
        **where(("torch", "numpy")),
    }
    print(write_result("round_mxfp4", result))
    for name, times in found.items():
        print(f"{name}: {times['wall_s']:.2f} s, {times['cpu_s']:.2f} s of CPU")


if __name__ == "__main__":
    main()
