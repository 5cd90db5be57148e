"""ONNX Runtime GenAI: its own builder makes a model of the bf16 folder, in float32, and its generator runs it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnxruntime_genai
from job import Client, one_by_one, run

ROOM = 1024  # positions of its cache, of which it wants at least as many as the sliding window has


def load(job: dict[str, Any]) -> Client:
    """Build (transformers reads the folder for that) and load."""
    built = f"{job['scratch']}/onnx"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", job["model"], "-o", built]
    command += ["-p", "fp32", "-e", "cpu", "-c", f"{job['scratch']}/cache"]
    built_by = subprocess.run(command, capture_output=True, text=True, check=False)
    if built_by.returncode:
        raise RuntimeError(f"the builder failed:\n{built_by.stdout}\n{built_by.stderr}")
    model = onnxruntime_genai.Model(built)

    def started(ids: list[int]) -> Any:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=ROOM)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array([ids], np.int32))
        return generator

    def logits(ids: list[int]) -> np.ndarray:
        return started(ids).get_output("logits")[0]

    def greedy(ids: list[int]) -> list[int]:
        generator, answer = started(ids), []
        while len(answer) < job["max_new"]:
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
            if answer[-1] in job["stops"]:
                break
        return answer

    return Client(logits, one_by_one(greedy))


if __name__ == "__main__":
    run(("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir"), load)
