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
import json, re, subprocess, sys, tempfile
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ossia.kernels.gpu import decode, dequant, experts, rows

ids, numbers, floats, size, real = "*i64", "*fp32", "*bf16", "i32", "fp32"
whole = "*i32"
tile = {"EXPERTS": 32, "COLUMNS": 32, "RANK": 16, "AS_FLOAT": False}
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
    (decode._attend_part, (floats, floats, whole, ids, ids, *[numbers] * 3, *[size] * 6, real),
     {"KV": 8, "GROUP": 8, "ROWS": 16, "SIZE": 64, "SLOTS": 64, "AS_FLOAT": False}, 4),
    (decode._attend_whole, (*[numbers] * 3, floats, floats, size, size), {"SPLITS": 64, "SIZE": 64}, 4),
    (decode._choose, (floats, ids, floats, size), {"K": 4, "SLOTS": 4, "EXPERTS": 128}, 1),
    (decode._sort, (ids, ids, ids, whole, size, size), {"ROWS": 32, "EXPERTS": 128, "MINE": 32}, 4),
    (decode._shrink, (floats, floats, ids, ids, numbers, size, size, size),
     {"PER_TOKEN": True, "RANK": 16, "BLOCK": 256}, 4),
    *((decode._gate_up, (floats, ids, whole, "*u8", "*u8", floats, numbers, floats, floats, *[size] * 5, real, real),
       {**tile, "ROWS": of_x, "BYTES": step}, warps) for of_x, (warps, step) in decode._SHAPES.items()),
    *((decode._down, (floats, whole, "*u8", "*u8", numbers, floats, floats, *[size] * 4),
       {**tile, "ROWS": of_x, "BYTES": step}, warps) for of_x, (warps, step) in decode._SHAPES.items()),
    (rows._exponentials, (floats, ids, *[numbers] * 3, size, size), {"BLOCK": 8192}, 8),
]
for generation in map(int, sys.argv[1:]):
    for kernel, types, constants, warps in kernels:
        names = kernel.arg_names
        signature = dict(zip([name for name in names if name not in constants], types, strict=True))
        signature = {name: signature.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        found = compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spilled = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\\d+)", usage)))
        assert "REG:" in usage, usage
        print(json.dumps([generation, kernel.__name__, found.metadata.shared, spilled]))
"""


def test_every_kernel_compiles_for_every_generation_within_its_shared_memory_and_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, SHARED_BYTES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 22 * len(SHARED_BYTES)
    assert [line for line in found if line[2] > SHARED_BYTES[line[0]] or line[3]] == []
