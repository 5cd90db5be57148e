"""How much memory a process may use: the machine's, or less where a control group holds it to less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ossia.ops.memory import gpu_memory, machine_memory

GIB = 2**30


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root folder of a machine of 16 GiB, 10 of them free, with these control groups."""
    meminfo = f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {10 * 2**20} kB\nHugePages_Total: 0\n"
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, (16, 10)),
        ("0::/\n", {}, (16, 10)),
        ("0::/\n", {f"{V2}/memory.max": f"{4 * GIB}\n", f"{V2}/memory.current": f"{3 * GIB}\n"}, (4, 1)),
        ("0::/\n", {f"{V2}/memory.max": "max\n", f"{V2}/memory.current": f"{3 * GIB}\n"}, (16, 10)),
        # a service of a slice: the slice may be the one that is held to less
        (
            "0::/user.slice/a.service\n",
            {
                f"{V2}/user.slice/a.service/memory.max": f"{8 * GIB}",
                f"{V2}/user.slice/a.service/memory.current": f"{GIB}",
                f"{V2}/user.slice/memory.max": f"{6 * GIB}",
                f"{V2}/user.slice/memory.current": f"{7 * GIB}",
                f"{V2}/other.slice/memory.max": f"{GIB}",
                f"{V2}/other.slice/memory.current": "0",
            },
            (6, 0),
        ),
        # version 1, with controllers together; a container sees its own group as the top
        (
            "5:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/1a\n0::/\n",
            {f"{V1}/memory.limit_in_bytes": f"{5 * GIB}", f"{V1}/memory.usage_in_bytes": f"{2 * GIB}"},
            (5, 3),
        ),
        (
            "4:memory:/\n",
            {f"{V1}/memory.limit_in_bytes": "9223372036854771712", f"{V1}/memory.usage_in_bytes": f"{2 * GIB}"},
            (16, 10),
        ),
    ],
)
def test_memory_is_the_machines_or_the_strictest_control_groups(
    groups: str, files: dict[str, str], expected: tuple[int, int], tmp_path: Path
) -> None:
    total, free = machine_memory(system(tmp_path, groups, files))
    assert (total / GIB, free / GIB) == expected


def test_this_machines_memory_is_a_sensible_number_of_bytes(tmp_path: Path) -> None:
    total, free = machine_memory()
    assert 0 <= free <= total
    assert total > 100 * 2**20
    unsaid, free = machine_memory(tmp_path)  # no /proc/meminfo, as on macOS
    assert free == unsaid >= total


@pytest.mark.parametrize(
    ("share", "reserved", "expected"),
    [(1.0, 3 << 30, (80 << 30, 70 << 30)), (0.25, 3 << 30, (20 << 30, 17 << 30)), (0.25, 21 << 30, (20 << 30, 0))],
)
def test_a_gpu_of_which_a_process_may_use_a_share_is_that_share(
    monkeypatch: pytest.MonkeyPatch, share: float, reserved: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert gpu_memory(torch.device("cuda")) == expected
