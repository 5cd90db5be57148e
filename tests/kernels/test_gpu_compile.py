"""Every Triton kernel of training compiles for each generation of GPU, without one, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="pip install 'ossia[dev-gpu]'")

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ossia.kernels.gpu import dequant, experts, rows

ids, numbers, floats, size, real = "*i64", "*fp32", "*bf16", "i32", "fp32"
mixed = {"K": 4, "EXTRA": True, "BLOCK": 1024}
kernels = [
    (dequant._expand, ("*u8", "*u8", floats, size, size, size), {"SPLIT": True, "GROUPS": 128}, 4),
    (experts._swiglu, (floats, floats, floats, ids, floats, size, real, real), {"EXTRA": True, "BLOCK": 1024}, 4),
    (experts._swiglu_back, (*[floats] * 4, ids, floats, size, real, real), {"EXTRA": True, "BLOCK": 1024}, 4),
    (experts._combine, (*[floats] * 4, ids, ids, floats, floats, size), mixed, 4),
    (experts._combine_back, (*[floats] * 5, ids, ids, floats, floats, size), mixed, 4),
    (experts._sum_rows, (floats, ids, floats, size), {"K": 4, "BLOCK": 1024}, 4),
    (rows._norm, (floats, floats, floats, numbers, size, real), {"BLOCK": 4096}, 4),
    (rows._norm_back, (floats, floats, floats, numbers, floats, size), {"BLOCK": 4096}, 4),
    (rows._rotate, (*[floats] * 4, size, size, size, real), {"HALF": 32, "HEADS": 16}, 4),
    (rows._sink, (floats, numbers, floats, size, size), {"HEADS": 16, "SIZE": 64}, 4),
    (rows._exponentials, (floats, ids, *[numbers] * 3, size, size), {"BLOCK": 8192}, 8),
]
for generation in map(int, sys.argv[1:]):
    for kernel, types, constants, warps in kernels:
        names = kernel.arg_names
        signature = dict(zip([name for name in names if name not in constants], types, strict=True))
        signature = {name: signature.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        found = compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": warps})
        spills = sum(found.asm["ptx"].count(word) for word in ("ld.local", "st.local"))
        print(json.dumps([generation, kernel.__name__, found.metadata.shared, spills]))
"""


def test_every_kernel_compiles_for_every_generation_within_its_shared_memory_and_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, SHARED_BYTES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 11 * len(SHARED_BYTES)
    assert [line for line in found if line[2] > SHARED_BYTES[line[0]] or line[3]] == []
