"""llama.cpp by `llama-cpp-python`: every logit, the cache in float32; with a LoRA file where the job names one."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from job import Client, one_by_one, run

ROOM = 1024


def load(job: dict[str, Any]) -> Client:
    """One sequence at a time, from nothing each time.

    Without buffers in the machine's own layout: with Q8_0 weights its kernels for AMX ended in a segmentation fault,
    and so with a file that `llama_model_quantize` wrote, and `Llama` has no argument for it.
    """
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain
    llama = llama_cpp.Llama(
        job["model"],
        n_ctx=ROOM,
        n_batch=ROOM,
        n_ubatch=ROOM,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        lora_path=job["adapter"],
        verbose=False,
    )

    def logits(ids: list[int]) -> np.ndarray:
        llama.reset()
        llama.eval(ids)
        return llama.scores[: len(ids)].copy()

    def greedy(ids: list[int]) -> list[int]:
        llama.reset()
        llama.eval(ids)
        answer = []
        while True:
            answer.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            if answer[-1] in job["stops"] or len(answer) == job["max_new"]:
                return answer
            llama.eval(answer[-1:])

    return Client(logits, one_by_one(greedy))


if __name__ == "__main__":
    run(("llama-cpp-python",), load)
