"""JSON over HTTP, and logprobs of given tokens as OpenAI's completions have them."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from subprocess import Popen
from typing import Any


def post(url: str, body: dict[str, Any]) -> Any:
    """JSON for JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def wait_for(url: str, process: Popen[bytes], *, timeout_s: float) -> None:
    """Until a server answers. RuntimeError where its process ends first, or it never does."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}; its last words are in its log")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"{url} didn't answer within {timeout_s:.0f} s")
