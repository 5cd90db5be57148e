"""Export a run for other programs, load it in transformers, and see that both give the same answer.

Run: python examples/to_transformers.py RUN exported          (needs: pip install transformers)
"""

import argparse
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ossia
from ossia.engine import Sampling

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("run", help="a run folder, with an adapter or a trained model")
options.add_argument("folder", help="a folder that isn't there yet")
options.add_argument("--question", default="Hello!")
options.add_argument("--max-tokens", type=int, default=32)
given = options.parse_args()

# The adapter is merged into the weights; what was written is read back and compared before the folder gets its name.
command = [sys.executable, "-m", "ossia", "export", given.run, "--to", "hf-bf16", "--output", given.folder]
subprocess.run(command, check=True)

tokenizer = AutoTokenizer.from_pretrained(given.folder)
theirs = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
messages = [{"role": "user", "content": given.question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = theirs.generate(**prompt, max_new_tokens=given.max_tokens, do_sample=False)
answer = output[0, prompt["input_ids"].shape[1] :].tolist()
print(f"transformers  {tokenizer.decode(answer)}")

ours = ossia.load(given.folder, dtype="float32")
(completion,) = ours.generate(
    prompt["input_ids"].tolist(), sampling=Sampling(temperature=0.0), max_tokens=given.max_tokens
)
print(f"ossia         {ours.vocabulary.decode(completion.ids)}")
print("the same" if completion.ids == answer else "they differ: near a tie, rounding decides")
