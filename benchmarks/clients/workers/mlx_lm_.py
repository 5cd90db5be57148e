"""MLX on a CPU: `mlx_lm` loads the MXFP4 folder itself and multiplies by the four-bit experts; the rest in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from job import Client, one_by_one, run
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def load(job: dict[str, Any]) -> Client:
    """The model without its tokenizer: jobs are ids."""
    model, _ = load_model(Path(job["model"]))
    model.set_dtype(mx.float32)

    def logits(ids: list[int]) -> np.ndarray:
        return np.array(model(mx.array([ids]))[0])

    def greedy(ids: list[int]) -> list[int]:
        answer = []
        for token, _ in generate_step(mx.array(ids), model, max_tokens=job["max_new"]):
            answer.append(int(token))
            if answer[-1] in job["stops"]:
                break
        return answer

    return Client(logits, one_by_one(greedy))


if __name__ == "__main__":
    run(("mlx", "mlx-cpu", "mlx-lm"), load)
