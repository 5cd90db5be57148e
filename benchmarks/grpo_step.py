"""Question: how long does a step of GRPO take, and in how much memory, against TRL's GRPOTrainer?

Run: python -m benchmarks.grpo_step      Needs: 2 cores

Both sides start from the same model that was taught to sort six digits for 200 steps, sample the same number of
answers of at most the same length to the same prompts with temperature 1, reward the exact answer by the same function,
and make one DAPO update of all weights in float32 on all of them; in turn, each in a process of its own. TRL generates
as it does without vLLM (transformers' `generate`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import (
    ROOT,
    peak_resident_bytes,
    ratio_of_medians,
    serve,
    side_by_side,
    take_turns,
    where,
)

MODULE = "benchmarks.grpo_step"
PACKAGES = ("torch", "transformers", "trl", "numpy", "safetensors", "tokenizers")
START_STEPS, LEARNING_RATE = 200, 1e-4


@dataclass(frozen=True)
class Case:
    """Prompts, answers to each, tokens of an answer at most, and TRL's micro-batch."""

    prompts: int
    group: int
    new: int
    micro_batch: int


CASES = {"sort": Case(16, 16, 80, 32)}


def make_start(case: Case, folder: Path) -> None:
    """The demo's untrained model, fine-tuned until it sorts now and then."""
    from ossia.demo.prepare import Plan, prepare

    with tempfile.TemporaryDirectory() as scratch:
        made, run = Path(scratch) / "made", Path(scratch) / "run"
        prepare(made, seed=0, plan=Plan())
        words = ("train", made / "demo.yaml", f"train.steps={START_STEPS}", f"output={run}")
        subprocess.run([sys.executable, "-m", "ossia", *words], cwd=ROOT, check=True, stdout=sys.stderr)
        (run / "model").rename(folder)


def recipe_of(case: Case, folder: Path, output: Path, threads: int) -> Any:
    """The shipped recipe with the case's sizes."""
    from ossia.config import load_recipe

    changes = (
        f"model={folder}",
        f"output={output}",
        f"rl.prompts={case.prompts}",
        f"rl.group={case.group}",
        f"rl.max_new={case.new}",
        "rl.mask_truncated=false",
        "rl.mismatch=none",
        "rl.eval_tasks=0",
        "eval.every=0",
        f"train.learning_rate={LEARNING_RATE}",
        f"train.threads={threads}",
    )
    return load_recipe(ROOT / "recipes" / "grpo-sort.yaml", changes)


@contextmanager
def policy_of(case: Case, folder: Path, threads: int) -> Iterator[Any]:
    """A policy as `ossia train` makes it."""
    from ossia.grpo import open_envs
    from ossia.model.open import open_model
    from ossia.rl.jail import Jails
    from ossia.rl.policy import Policy
    from ossia.run.start import adamw_of, settle
    from ossia.run.trained import make_trainable

    with tempfile.TemporaryDirectory() as scratch, Jails() as jails:
        recipe = recipe_of(case, folder, Path(scratch), threads)
        settle(recipe)
        model, vocab = open_model(recipe.model, dtype=recipe.dtype, weights=recipe.weights, device="cpu")
        make_trainable(model, recipe)
        yield Policy(recipe, model, vocab, adamw_of(recipe, model), open_envs(recipe, jails))


def ossia_worker(case: Case, folder: Path, threads: int) -> None:
    """Ossia's side."""
    with policy_of(case, folder, threads) as policy:

        def step() -> dict[str, Any]:
            asked = policy.next_step()
            start = time.perf_counter()
            found = policy.step(asked, LEARNING_RATE)
            return {
                "step_s": time.perf_counter() - start,
                "sample_s": found["sample_s"],
                "answer_tokens": found["answer_tokens"],
                "reward": found["reward"],
                "peak_bytes": peak_resident_bytes(),
            }

        serve({"samples": case.prompts * case.group}, step)


def prompts_of(folder: Path, count: int) -> list[tuple[tuple[int, ...], str, str]]:
    """The same prompts as ids and as text, each with its answer."""
    from ossia.config import HarmonyConfig
    from ossia.harmony.render import Renderer
    from ossia.harmony.vocab import Vocabulary
    from ossia.rl.envs.procedural import Sort
    from ossia.rl.tasks import NamedEnv, TaskStream

    vocab = Vocabulary.from_file(folder / "tokenizer.json")
    stream = TaskStream([NamedEnv("sort", Sort(), 1.0)], "train", 0, Renderer(vocab), HarmonyConfig(), 1000)
    return [(asked.ids, vocab.decode(asked.ids), asked.task.info["answer"]) for asked in stream.take(count)]


def peer_worker(case: Case, folder: Path, threads: int) -> None:
    """TRL's side: each step of its trainer waits for a line of input and answers with one."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from ossia.harmony.vocab import Vocabulary
    from ossia.rl.rollout import parse_turn

    vocab = Vocabulary.from_file(folder / "tokenizer.json")
    most_steps = 64
    prompts = prompts_of(folder, most_steps * case.prompts)
    rows = [{"prompt": text, "answer": answer} for _, text, answer in prompts]
    seen: list[tuple[float, int]] = []

    def exact(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        rewards = [
            float(parse_turn(vocab, ids).answer() == right) for ids, right in zip(completion_ids, answer, strict=True)
        ]
        seen.extend(zip(rewards, map(len, completion_ids), strict=True))
        return rewards

    class Turns(TrainerCallback):
        """One step for each line of input."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            seen.clear()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            told = {
                "step_s": time.perf_counter() - self.start,
                "answer_tokens": fmean(length for _, length in seen),
                "reward": fmean(reward for reward, _ in seen),
                "peak_bytes": peak_resident_bytes(),
            }
            print(json.dumps(told), file=out, flush=True)

    torch.set_num_threads(threads)
    out, sys.stdout = sys.stdout, sys.stderr  # what TRL prints is no answer
    samples = case.prompts * case.group
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            max_steps=most_steps,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=samples // case.micro_batch,
            num_generations=case.group,
            max_completion_length=case.new,
            temperature=1.0,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            model_init_kwargs={"dtype": torch.float32},
        )
        trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=exact,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            callbacks=[Turns()],
        )
        for ids, text, _ in prompts[: case.prompts]:
            assert trainer.processing_class(text)["input_ids"] == list(ids), text
        print(json.dumps({"samples": samples}), file=out, flush=True)
        trainer.train()


SIDES = {"ossia": ossia_worker, "peer": peer_worker}


def compare(name: str, folder: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Both sides in turn."""
    case = CASES[name]
    ready, runs = take_turns(MODULE, name, folder, SIDES, repeats, threads)
    assert ready["ossia"] == ready["peer"], ready
    counted = {side: found[1:] for side, found in runs.items()}
    first = {side: found[0] for side, found in runs.items()}
    lengths = [found["answer_tokens"] for found in first.values()]
    assert abs(lengths[0] - lengths[1]) < 0.1 * lengths[1], f"the sides' first answers differ in length: {lengths}"
    step_s = {side: [run["step_s"] for run in found] for side, found in counted.items()}
    peak = {side: max(run["peak_bytes"] for run in found) for side, found in runs.items()}
    return {
        "question": (__doc__ or "").splitlines()[0],
        "case": name,
        "config": {**vars(case), "repeats": repeats, "threads": threads, "start_steps": START_STEPS},
        "median_step_s": {side: median(found) for side, found in step_s.items()},
        "answer_tokens": {side: fmean(run["answer_tokens"] for run in found) for side, found in counted.items()},
        "sampled_tokens_per_s": {
            side: median(run["answer_tokens"] * ready[side]["samples"] / run["step_s"] for run in found)
            for side, found in counted.items()
        },
        "peak_bytes": peak,
        "speedup": ratio_of_medians(step_s["peer"], step_s["ossia"]),
        "memory_ratio": peak["ossia"] / peak["peer"],
        "raw": runs,
        **where(PACKAGES),
    }


def tell(result: dict[str, Any]) -> str:
    """The result in a line."""
    step = result["median_step_s"]
    return (
        f"{step['ossia']:.2f} against {step['peer']:.2f} s a step, {result['speedup']:.2f}x, "
        f"at {result['memory_ratio']:.2f}x the memory"
    )


if __name__ == "__main__":
    side_by_side(MODULE, __doc__ or "", CASES, "sort", make=make_start, sides=SIDES, compare=compare, tell=tell)
