"""Fine-tune on the questions and answers of a CSV file, from Python, and ask the trained model the first question.

Run: python examples/fine_tune.py MODEL pairs.csv runs/pairs       then: ossia chat MODEL --adapter runs/pairs
Columns: question, answer, and thinking if you have it. The rows go into pairs.jsonl, the recipe into pairs.yaml.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import ossia

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("model", help="a gpt-oss checkpoint's folder, or owner/name on the hub")
options.add_argument("csv", type=Path)
options.add_argument("output", type=Path, help="the run folder, a new one")
options.add_argument("--steps", type=int, default=60)
given = options.parse_args()

# 1. Rows in OpenAI's messages form, one JSON object a line. `thinking` becomes the analysis channel.
rows_file = given.csv.with_suffix(".jsonl")
with given.csv.open(encoding="utf-8", newline="") as table, rows_file.open("w", encoding="utf-8") as rows:
    for pair in csv.DictReader(table):
        reply = {"role": "assistant", "content": pair["answer"]}
        reply |= {"thinking": pair["thinking"]} if pair.get("thinking") else {}
        rows.write(json.dumps({"messages": [{"role": "user", "content": pair["question"]}, reply]}) + "\n")

# 2. A recipe: a dict here, YAML for the `ossia` command. JSON is YAML.
recipe = {
    "model": given.model,
    "adapter": {"rank": 16, "targets": ["attention", "experts"]},
    "data": str(rows_file),
    "max_length": 1024,
    "train": {"steps": given.steps, "tokens_per_step": 1024},
    "output": str(given.output),
}
recipe_file = given.csv.with_suffix(".yaml")
recipe_file.write_text(json.dumps(recipe, indent=2), encoding="utf-8")

# 3. What will be trained: every token with its weight, in the form that other programs read.
command = [sys.executable, "-m", "ossia", "data", str(recipe_file), "--json"]
for line in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
    sample = json.loads(line)
    trained = sum(weight > 0 for weight in sample["weights"])
    print(f"{sample['source']}: {len(sample['ids'])} tokens, {trained} of them trained")

# 4. Train, and use what was trained.
run = ossia.train(recipe)
question = json.loads(rows_file.read_text(encoding="utf-8").splitlines()[0])["messages"][:1]
reply = ossia.load(given.model, adapter=run.folder).chat(question, temperature=0.0, max_tokens=64)
print(f"{question[0]['content']} -> {reply.content}")
