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
    """`generate` is its own, all prompts in one batch with their padding on the left."""
    stops, pad = set(job["stops"]), min(job["stops"])

    @torch.no_grad()
    def logits(ids: list[int]) -> np.ndarray:
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()

    @torch.no_grad()
    def greedy(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        asked = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        new = job["max_new"]
        done = model.generate(
            input_ids=asked, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=pad
        )
        return [up_to_stop(row) for row in done[:, longest:].tolist()]

    def up_to_stop(ids: list[int]) -> list[int]:
        return ids[: next((place + 1 for place, one in enumerate(ids) if one in stops), len(ids))]

    return Client(logits, greedy)


if __name__ == "__main__":
    run(("transformers", "torch"), lambda job: client(load_model(job), job))
