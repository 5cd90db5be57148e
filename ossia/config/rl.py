"""The recipe's keys for reinforcement learning: environments, reward functions, and `rl`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ossia.config.section import Clash, Section, listed, refuse, words


class EnvConfig(Section):
    """One environment that a policy is rewarded by; docs/environments.md lists them."""

    id: str = Field(min_length=1)
    """Name of a shipped environment, or `module:name` or `file.py:name` of one of your own."""
    weight: float = Field(1.0, gt=0)
    """How often its tasks are taken, against the other environments'."""
    options: dict[str, Any] = Field({}, json_schema_extra=words("none"))
    """The environment's own options."""


def _one_or_more_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Envs = Annotated[
    tuple[EnvConfig, ...], Field(strict=False, min_length=1), BeforeValidator(lambda value: listed(value, "id"))
]
Rewards = Annotated[
    tuple[Annotated[str, Field(pattern=r"^.+:[A-Za-z_]\w*$")], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_one_or_more_texts),
]


class RlConfig(Section):
    """Reinforcement learning from rewards (`method: grpo`)."""

    prompts: int = Field(16, ge=1)
    """Tasks per step."""
    group: int = Field(16, ge=2)
    """Samples of each task: a reward counts against the mean of its group."""
    max_new: int = Field(1024, ge=1)
    """Tokens sampled in one turn, at most."""
    max_turns: int = Field(8, ge=1)
    """Turns of an episode with tools, at most."""
    rollout: str = Field("engine", pattern=r"^(engine|https?://[^\s/]+.*)$")
    """What samples: `engine`, in this process, or the address of a vLLM server that adapters can be loaded into, such
    as http://127.0.0.1:8000/v1; docs/rl.md has its command."""
    rollout_timeout_s: float = Field(600.0, gt=0.0)
    """Seconds that a rollout server may take for one sample, its time in the queue included."""
    asynchronous: int = Field(0, ge=0, le=1, alias="async")
    """1: while a batch is trained, a rollout server samples the next one with the adapter as it was before that update;
    `mismatch` corrects for it. 0: one after the other."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """The policy loss; docs/rl.md says what each is for."""
    clip_low: float | None = Field(None, gt=0, lt=1, json_schema_extra=words("the loss's own"))
    """How far a probability may fall in one batch before its gradient stops."""
    clip_high: float | None = Field(None, gt=0, json_schema_extra=words("the loss's own"))
    """How far a probability may rise in one batch before its gradient stops."""
    spread: bool | None = Field(None, json_schema_extra=words("the loss's own"))
    """Whether advantages are divided by the spread of their group's rewards."""
    iterations: int = Field(1, ge=1)
    """Updates on each batch of samples."""
    kl: float = Field(0.0, ge=0.0)
    """Weight of the divergence from the reference policy, the model with its adapter switched off."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How that divergence is estimated from the sampled tokens."""
    mismatch: Literal["none", "token", "sequence"] = "token"
    """Correction for a sampler whose numbers differ from the trainer's: truncated importance weights per token, per
    sequence, or none."""
    mismatch_cap: float = Field(2.0, ge=1.0)
    """Where those weights are cut off."""
    max_mismatch: float = Field(0.02, gt=0.0)
    """Largest divergence of the sampler from the trainer (nats per token, mean of a step) before the run stops."""
    router_replay: bool = Field(
        default_factory=lambda given: given["rollout"] == "engine",
        json_schema_extra=words("true where the engine samples"),
    )
    """Train through the experts that were chosen while sampling; from a rollout server only if asked for, since it has
    to be started with `--enable-return-routed-experts`."""
    refill: int = Field(0, ge=0)
    """How many times tasks whose samples all got the same reward are replaced by others in a step (DAPO's dynamic
    sampling)."""
    overlong: int = Field(0, ge=0)
    """Within this many tokens of `max_new` a reward falls, by up to 1 (DAPO's overlong shaping); 0: it doesn't."""
    mask_truncated: bool = True
    """Leave samples that were cut off by their length out of the loss."""
    reward_timeout_s: float = Field(60.0, gt=0.0)
    """Seconds that an environment may take for one turn; then that sample is left out and counted."""
    reward_workers: int = Field(2, ge=1, le=256)
    """Turns that are judged at once, beside generation."""
    jail: Literal["locked", "weak"] = "locked"
    """Where code that a model wrote runs: locked in at the level that its environment needs, or the run doesn't start;
    `weak` accepts limits alone where the machine can't give that, with your files open to the code."""
    eval_tasks: int = Field(64, ge=0)
    """Held-out tasks answered greedily at each evaluation; 0: none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        too_long = self.overlong > self.max_new
        why = f"`rl.overlong` is {self.overlong}, above `rl.max_new`, {self.max_new}; it is the last part of it"
        ahead = bool(self.asynchronous)
        refuse(
            Clash(("overlong", "max_new"), why) if too_long else None,
            Clash(
                ("async", "rollout"),
                "`rl.async` needs a server in `rl.rollout`: the engine samples with the very weights that are trained",
            )
            if ahead and self.rollout == "engine"
            else None,
            Clash(("async", "mismatch"), "`rl.async` needs a correction: set `rl.mismatch` to token or sequence")
            if ahead and self.mismatch == "none"
            else None,
        )
        return self
