"""Reinforcement learning from rewards, top to bottom: tasks, rollouts, rewards, advantages, the step, the run folder.

```text
tasks -> Harmony prompts -> engine (live adapter) -> turns -> rewards -> advantages -> packs -> the same step as SFT
```
One process and one copy of the weights: the engine samples with the very tensors that the optimizer updates, and the
reference policy is the model with its adapter switched off. With `rl.rollout` a server samples, and is handed the
adapter after each step. The run folder is that of `sft.py`; samples.jsonl holds
every rollout. Sources: GRPO, arXiv:2402.03300, and its kin, see `ops/policy.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ossia.config import Recipe
from ossia.errors import RunError
from ossia.rl.jail import Jails
from ossia.rl.policy import Policy
from ossia.rl.sampler import rollout_server
from ossia.rl.sampler.served import Served
from ossia.rl.tasks import NamedEnv, open_envs
from ossia.run.start import adamw_of, job_of, say, settle, started
from ossia.run.trained import RunResult, save_result
from ossia.train.events import Sink
from ossia.train.loop import run_loop
from ossia.train.ranks.launched import launched
from ossia.train.report import write_report


def run(recipe: Recipe, *, resume: bool = False, sink: Sink | None = None) -> RunResult:
    """Train as the recipe says.

    resume  go on from the newest whole checkpoint of `recipe.output`
    sink    hears every event instead of the terminal
    Raises  UserError for what the user has to change; Interrupted, saved, after Ctrl-C
    """
    place = launched()
    if place is not None and place.size > 1:
        raise RunError(
            f"rank {place.rank}: `method: grpo` is one process as yet, and a launcher has started {place.size}\n"
            "  next: start one; with `rl.rollout` a server on other GPUs can sample for it"
        )
    settle(recipe)
    steps = recipe.train.steps
    assert steps is not None
    served = rollout_server(recipe)
    jails = Jails(workers=recipe.rl.reward_workers, allow_weak=recipe.rl.jail == "weak")
    with jails:
        envs = open_envs(recipe, jails)
        if jails.levels:
            say(f"jail: programs run at level {', '.join(jails.levels)}")
        return _learn(recipe, envs, served, steps, resume=resume, sink=sink)


def _learn(
    recipe: Recipe, envs: Sequence[NamedEnv], served: Served | None, steps: int, *, resume: bool, sink: Sink | None
) -> RunResult:
    """The run, once its environments are there."""
    with started(recipe, steps, resume=resume, sink=sink) as begun:
        model = begun.model
        policy = Policy(recipe, model, begun.vocab, adamw_of(recipe, model), envs, served)
        if begun.saved is None:
            policy.samples.cut(0)
        job = job_of(
            recipe,
            model,
            policy.optimizer,
            steps,
            data=policy,
            step=policy.step,
            evaluate=policy.evaluate if recipe.rl.eval_tasks else None,
            counts=lambda: {**policy.counts, **policy.rollout.sampler.counts},
        )
        try:
            result = run_loop(job, begun.log, begun.saved)
        finally:
            policy.judge.close()
    trained = save_result(recipe, model)
    say(f"report: {write_report(recipe.output)}")
    return RunResult(recipe.output, result.step, trained)
