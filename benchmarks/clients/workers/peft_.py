"""An adapter's folder in `peft`, on the model in transformers."""

from __future__ import annotations

from job import run
from peft import PeftModel
from transformers_ import client, load_model

if __name__ == "__main__":
    run(
        ("peft", "transformers", "torch"),
        lambda job: client(PeftModel.from_pretrained(load_model(job), job["adapter"]), job),
    )
