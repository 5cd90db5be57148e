"""What others do after training, in either version of transformers: load, put the adapter on, merge, save.

Run by itself under 4.57.6. Arguments: base folder, adapter's folder, folder to write, a shard's size, dtype.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_merged(base: Path, adapter: Path, folder: Path, shard: str, dtype: str = "bfloat16") -> None:
    """Write the merged model and its tokenizer as transformers writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_merged(*map(Path, sys.argv[1:4]), *sys.argv[4:])
