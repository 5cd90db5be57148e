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

from benchmarks.clients.venvs import transformers_457


def run_transformers_457(packed: Path, plain: Path, conversation: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    """What it makes of an MXFP4 checkpoint and its bf16 twin, see `transformers_457.py`; installed on the first run."""
    site = transformers_457()
    (folder / "conversation.json").write_text(json.dumps(conversation))
    script = Path(__file__).with_name("transformers_457.py")
    command = [sys.executable, script, packed, plain, folder / "conversation.json", folder / "found.pt"]
    subprocess.run(list(map(str, command)), check=True, timeout=240, env=os.environ | {"PYTHONPATH": str(site)})
    return torch.load(folder / "found.pt")
