"""transformers, whichever version this Python has, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from job import Client, run
from transformers import AutoModelForCausalLM


def load_model(job: dict[str, Any]) -> Any:
    """As its documentation says; a tensor that is missing, left over or misshapen is an error."""
    model, info = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def client(model: Any, job: dict[str, Any]) -> Client:
    """`generate` is its own."""

    @torch.no_grad()
    def logits(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()

    @torch.no_grad()
    def greedy(ids: list[int]) -> list[int]:
        asked = torch.tensor([ids])
        done = model.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=job["max_new"], do_sample=False
        )
        return done[0, len(ids) :].tolist()

    return Client(logits, greedy)


if __name__ == "__main__":
    run(("transformers", "torch"), lambda job: client(load_model(job), job))
