"""transformers 4.57.6, which wants other versions of its companions: it lives in a folder of its own inside the virtual
environment, put there the first time it is asked for, and runs in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

OLD = (
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.2",
    "certifi==2026.10.18",
)


def run_transformers_457(packed: Path, plain: Path, conversation: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    """What it makes of an MXFP4 checkpoint and its bf16 twin, see `transformers_457.py`; installed on the first run."""
    site = Path(sys.prefix) / "transformers-4.57.6"
    if not site.is_dir():
        part = site.with_suffix(f".{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part), *OLD]
        subprocess.run(pip, check=True, timeout=240)
        part.rename(site)
    (folder / "conversation.json").write_text(json.dumps(conversation))
    script = Path(__file__).with_name("transformers_457.py")
    command = [sys.executable, script, packed, plain, folder / "conversation.json", folder / "found.pt"]
    subprocess.run(list(map(str, command)), check=True, timeout=240, env=os.environ | {"PYTHONPATH": str(site)})
    return torch.load(folder / "found.pt")
