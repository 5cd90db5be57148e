"""Run under transformers 4.57.6 by `test_transformers_loads.py`: load both twins, save what they compute.

Arguments: folder of the MXFP4 checkpoint, folder of the bf16 one, file of a JSON conversation, file to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

packed, plain, conversation, output = map(Path, sys.argv[1:])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(packed)
ids = tokenizer.apply_chat_template(json.loads(conversation.read_text()), add_generation_prompt=True)
found = {"version": transformers.__version__, "ids": ids, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
for key, path, dtype in (("mxfp4", packed, "bfloat16"), ("bf16", plain, "bfloat16"), ("float32", plain, "float32")):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found[key] = model(torch.tensor([ids])).logits[0]
    found["stops"] = model.generation_config.eos_token_id
    found["inv_freq"] = model.model.rotary_emb.inv_freq
torch.save(found, output)
