"""The recipe: every key, its type, its default and its meaning. `ossia explain` and docs/recipe.md are made from here.

Frozen pydantic models that forbid unknown keys. Types are strict: text is never a number, nor a number a truth value.
Only values that work today are accepted; what comes later is not listed as allowed.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ossia.config.rl import Envs, Rewards, RlConfig
from ossia.config.section import Clash, FolderPath, Section, Share, listed, refuse, words
from ossia.config.yaml_lines import dump_yaml

TargetName = Literal[
    "attention",
    "experts",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_up_proj",
    "down_proj",
    "router",
    "lm_head",
]
TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "experts": ("gate_up_proj", "down_proj"),
}
Channel = Literal["analysis", "commentary", "final"]
Effort = Literal["low", "medium", "high"]

LEARNING_RATE_ADAPTER = 2e-4
LEARNING_RATE_ALL_WEIGHTS = 2e-5
TOKENS_PER_STEP = 32768
TOKENS_PER_PACK = 8192


class LoraShape(NamedTuple):
    """Rank and alpha of the low-rank update of one kind of matrix."""

    rank: int
    alpha: float


class TargetConfig(Section):
    """One LoRA target with its own size."""

    rank: int | None = Field(None, ge=1, json_schema_extra=words("the adapter's rank"))
    """Rank for this target only."""
    alpha: float | None = Field(None, gt=0, json_schema_extra=words("keeps the adapter's alpha / rank"))
    """Alpha for this target only."""


def _shape_of_targets(value: Any) -> str:
    return "mapping" if isinstance(value, dict) else "list"


def _empty_targets_have_defaults(value: Any) -> Any:
    return {name: {} if own is None else own for name, own in value.items()} if isinstance(value, dict) else value


Targets = Annotated[
    Annotated[tuple[TargetName, ...], Field(strict=False, min_length=1), Tag("list")]
    | Annotated[dict[TargetName, TargetConfig], Field(min_length=1), Tag("mapping")],
    Discriminator(_shape_of_targets),
    BeforeValidator(_empty_targets_have_defaults),
]


class AdapterConfig(Section):
    """Low-rank adapters (LoRA) on frozen weights. Leave the whole section out to train all weights."""

    rank: int = Field(16, ge=1)
    """Rank of the low-rank update, per matrix (per expert for experts)."""
    alpha: float = Field(default_factory=lambda given: 2.0 * given["rank"], gt=0, json_schema_extra=words("2 x rank"))
    """Scale of the update: it counts alpha / rank (alpha / sqrt(rank) with rslora)."""
    targets: Targets = ("attention", "experts")
    """What gets an adapter: a list of names, or a mapping from name to its own rank and alpha. `attention` stands for
    q_proj, k_proj, v_proj and o_proj; `experts` for gate_up_proj and down_proj."""
    dropout: Share = 0.0
    """Share of an adapter's inputs that is zeroed while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init_from: FolderPath | None = None
    """Folder of an adapter to start from, instead of a fresh one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        twice = [name for name in dict.fromkeys(self.targets) if list(self.targets).count(name) > 1]
        refuse(*(Clash(("targets",), f"`adapter.targets` names {name} twice; keep one") for name in twice))
        return self

    def by_target(self) -> dict[str, LoraShape]:
        """Rank and alpha of each single target, groups expanded; a name of its own beats the group it is in."""
        given = self.targets if isinstance(self.targets, dict) else {name: TargetConfig() for name in self.targets}
        shapes: dict[str, LoraShape] = {}
        for name, own in sorted(given.items(), key=lambda item: item[0] not in TARGET_GROUPS):  # groups first
            rank = own.rank if own.rank is not None else self.rank
            alpha = own.alpha if own.alpha is not None else self.alpha * rank / self.rank
            for single in TARGET_GROUPS.get(name, (name,)):
                shapes[single] = LoraShape(rank, alpha)
        return shapes


class TrainOnConfig(Section):
    """Which of the assistant's tokens are trained."""

    turns: Literal["all", "last"] = "all"
    """Every assistant turn of a conversation, or only the last one."""
    channels: Annotated[tuple[Channel, ...], Field(strict=False, min_length=1)] = ("analysis", "commentary", "final")
    """Channels whose messages are trained; tool calls are in commentary."""


class DataSourceConfig(Section):
    """One source of training rows."""

    path: str = Field(min_length=1)
    """A .jsonl, .json or .parquet file, a folder of these, or a Hugging Face dataset (owner/name; extra `hub`). In
    Parquet and on the hub a null inside a row is the same as an absent key: a table can't tell them apart."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text", "tokens"] = "auto"
    """How rows are laid out; `auto` recognises it from the first rows and says what it found."""
    weight: float = Field(1.0, gt=0)
    """How often each row of this source is read per epoch, on average: 0.5 takes every other row, 2 each row twice."""
    split: str = "train"
    """Split of a Hugging Face dataset; files have none."""
    columns: dict[str, str] = Field({}, json_schema_extra=words("none"))
    """Other names for a row's fields: {field Ossia knows: your column}."""
    reasoning_effort: Effort | None = Field(None, json_schema_extra=words("harmony.reasoning_effort"))
    """Reasoning effort written into the system message of rows that give none."""
    developer: str | None = None
    """Developer instructions for rows that bring none."""
    tools: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] | None = None
    """Function tools (OpenAI's JSON form) for rows that bring none."""
    train: TrainOnConfig | None = Field(None, json_schema_extra=words("harmony.train"))
    """What is trained in rows of this source."""


DataSources = Annotated[
    tuple[DataSourceConfig, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(lambda value: listed(value, "path")),
]


def is_day(text: str) -> bool:
    """Whether this is a day of the calendar, written YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class HarmonyConfig(Section):
    """What the Harmony system message says, and what is trained where a data source doesn't say."""

    identity: str = "You are ChatGPT, a large language model trained by OpenAI."
    """First line of the system message."""
    knowledge_cutoff: str | None = "2024-06"
    """Knowledge cutoff in the system message; null leaves the line out."""
    current_date: str | None = None
    """Current date in the system message, as YYYY-MM-DD; null leaves the line out."""
    reasoning_effort: Effort = "medium"
    """Reasoning effort in the system message of rows and sources that give none."""
    train: TrainOnConfig = TrainOnConfig()
    """Which of the assistant's tokens are trained."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        day = self.current_date
        if day is not None and not is_day(day):
            refuse(Clash(("current_date",), f"`harmony.current_date` is {day}; write a day as YYYY-MM-DD"))
        return self


class EvalConfig(Section):
    """Held-out loss during training and for `ossia eval`."""

    split: Share = 0.0
    """Share of the training rows that is held out, chosen by the seed."""
    data: DataSources | None = None
    """Held-out rows of their own, written like `data`; instead of `split`."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates once, at the end."""
    max_samples: int | None = Field(None, ge=1, json_schema_extra=words("all held-out samples"))
    """At most this many samples per evaluation."""
    answers: int = Field(4, ge=0)
    """Held-out prompts that are answered before and after training, for the report; 0: none."""
    answer_tokens: int = Field(128, ge=1)
    """Longest of these answers, in tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        both = self.split and self.data
        refuse(Clash(("data", "split"), "`eval.split` and `eval.data` are both given; keep one") if both else None)
        return self


class TrainConfig(Section):
    """The training loop and its optimizer (AdamW with decoupled weight decay)."""

    steps: int | None = Field(None, ge=1, json_schema_extra=words("as many as `epochs` takes"))
    """Optimizer steps to train for; give this or `epochs`. A run keeps its length, because the learning rate of every
    step depends on it; to train on, start another run from what this one trained (`adapter.init_from`, or `model`)."""
    epochs: float | None = Field(
        default_factory=lambda given: None if given["steps"] is not None else 1.0,
        gt=0,
        json_schema_extra=words("1.0 where `steps` is not given"),
    )
    """Passes over the data; give this or `steps`."""
    tokens_per_step: int = Field(TOKENS_PER_STEP, ge=1, json_schema_extra=words("32768, or max_length if larger"))
    """Tokens per optimizer step, over all packs and devices: the batch size."""
    tokens_per_pack: int = Field(
        default_factory=lambda given: min(TOKENS_PER_PACK, given["tokens_per_step"]),
        ge=1,
        json_schema_extra=words("8192, or max_length if larger; at most tokens_per_step"),
    )
    """Tokens that go through a layer at once; lower it to save memory, the gradient stays the same."""
    learning_rate: float = Field(
        LEARNING_RATE_ADAPTER, gt=0, json_schema_extra=words("2e-4 with an adapter, 2e-5 for all weights")
    )
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """Lowest learning rate, as a share of `learning_rate`."""
    warmup: float = Field(0.03, ge=0)
    """Warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay; biases and norms are left out of it."""
    beta1: Share = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: Share = 0.95
    """AdamW's decay of the mean of squared gradients."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's term against division by zero."""
    clip: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this total norm; null never does."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Decides the order of the data, the held-out split, fresh adapters and dropout."""
    save_every: int = Field(100, ge=0)
    """Steps between checkpoints; 0 saves once, at the end."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep; older ones are removed."""
    recompute: Literal["auto", "always", "never", "offload"] = "auto"
    """Whether activations are computed again in the backward pass (less memory) or kept (less time); `offload`: again,
    from layers' inputs that wait in the machine's memory, for the longest steps on a GPU."""
    threads: int | None = Field(None, ge=1, le=1024, json_schema_extra=words("torch's own choice"))
    """CPU threads; more than the machine has cores are slower, not faster."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        refuse(self._length_clash(), self._warmup_clash())
        return self

    def _length_clash(self) -> Clash | None:
        if self.steps is not None and self.epochs is not None:
            return Clash(("epochs", "steps"), "`train.steps` and `train.epochs` are both given; keep one")
        if self.steps is None and self.epochs is None:
            return Clash(("steps", "epochs"), "`train.steps` and `train.epochs` are both null; give one")
        return None

    def _warmup_clash(self) -> Clash | None:
        if self.warmup >= 1 and not self.warmup.is_integer():
            rule = "below 1 it is a share of all steps, from 1 on a whole number of steps"
            return Clash(("warmup",), f"`train.warmup` is {self.warmup}; {rule}")
        if self.steps is not None and self.warmup >= max(self.steps, 1):
            why = f"`train.warmup` is {self.warmup:g} steps, which leaves none of `train.steps`, {self.steps}"
            return Clash(("warmup", "steps"), why)
        return None


class LogConfig(Section):
    """Where measurements go besides the run folder and the terminal."""

    sinks: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)] = ()
    """Other places that events are sent to; each needs its extra."""


class ParallelConfig(Section):
    """Training by several processes, the ranks of a run, that share each step's packs (docs/parallel.md)."""

    ranks: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Processes that `ossia train` starts on this machine, on GPUs one for each; `auto`: with `method: sft` as many as
    there are GPUs to be seen, else one. Under torchrun it's torchrun that says how many."""
    shard: Literal["auto", "none", "all"] = "auto"
    """Whether each rank holds only a part of every weight, and of what is trained without an adapter (`all`), or
    everything (`none`); `auto`: parts where all weights are trained, or where everything doesn't fit."""
    experts: Literal["gather", "stay"] = "gather"
    """Whether experts travel to the tokens, a layer's at a time (`gather`, where weights are cut), or tokens to the
    experts, of which each rank has some for good (`stay`; the ranks have to divide the experts)."""
    context: int = Field(1, ge=1, le=64)
    """Ranks that share each pack's tokens, for sequences that don't fit one GPU; divides the ranks, and the model's
    key-value heads (8)."""
    offload: bool = False
    """Whether the parts of cut weights wait in the machine's memory and AdamW goes over them there, so that a GPU holds
    what is gathered and no more. On a CPU it changes nothing."""
    timeout: float = Field(600.0, ge=1)
    """Seconds that ranks wait for one that doesn't come and isn't known to be busy, before the run ends with an error
    that names it."""
    async_save: bool = True
    """Where trained weights are cut over the ranks: copy a rank's part of them and of the optimizer's state into the
    machine's memory, 12 bytes a weight, and save that while training goes on; false waits and copies nothing."""


class Recipe(Section):
    """Everything that decides a run. `model` has to be given, and `data` or `env`; all other keys have a default that
    works."""

    method: Literal["sft", "grpo"] = "sft"
    """What kind of training: `sft`, supervised fine-tuning on conversations; `grpo`, reinforcement learning from
    rewards (GRPO and its kin, see `rl.loss`)."""
    model: str = Field(min_length=1)
    """Folder of a gpt-oss checkpoint, or a Hugging Face model (owner/name; extra `hub`)."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Type of activations and adapters."""
    weights: Literal["auto", "resident", "stream", "mmap", "bf16"] = "auto"
    """Where the weights are while training: `resident` on the device, packed, `stream` experts in the machine's memory,
    sent to the GPU layer by layer, `mmap` in the checkpoint's files, `bf16` expanded to bfloat16; `auto` takes what
    fits."""
    attention: Literal["auto", "reference", "cpu", "flash", "fa3", "fa4", "triton"] = "auto"
    """What computes attention: `flash`, FlashAttention 2 of torch; `fa3` and `fa4`, where they are installed; `triton`,
    our kernels; `cpu`, torch's for CPU; `reference`, slow; `auto` takes the fastest. Tried before the first step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto` takes a GPU where there is one."""
    adapter: AdapterConfig | None = Field(None, json_schema_extra=words("left out: all weights are trained"))
    """Low-rank adapters (LoRA) on frozen weights; left out, all weights are trained."""
    qat: Literal["mxfp4"] | None = Field(None, json_schema_extra=words("left out: experts are trained unrounded"))
    """Quantisation-aware training: experts are computed as an export to hf-mxfp4 holds them, merged and rounded to
    MXFP4; gradients pass through the rounding. The export is then the very model that was trained (docs/export.md)."""
    data: DataSources | None = Field(None, json_schema_extra=words("has to be given, unless `env` is"))
    """One or several sources of training rows; with `reward`, of prompts."""
    env: Envs | None = Field(None, json_schema_extra=words("none"))
    """One or several environments that reward a policy, for `method: grpo`."""
    reward: Rewards | None = Field(None, json_schema_extra=words("none"))
    """Instead of `env`: functions that reward the answers to the prompts in `data`, each `module:function` or
    `file.py:function`, in TRL's form; several add up."""
    rl: RlConfig = RlConfig()
    """Reinforcement learning, for `method: grpo`."""
    harmony: HarmonyConfig = HarmonyConfig()
    """What the Harmony system message says, and what is trained."""
    max_length: int = Field(4096, ge=2)
    """Longest sample, in tokens."""
    on_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sample over `max_length`; dropped and truncated ones are counted and shown."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that can't be used; skipped ones are counted and shown."""
    eval: EvalConfig = EvalConfig()
    """Held-out loss."""
    train: TrainConfig = TrainConfig()
    """The training loop and its optimizer."""
    parallel: ParallelConfig = ParallelConfig()
    """Training by several processes."""
    log: LogConfig = LogConfig()
    """Where measurements go besides the run folder."""
    output: FolderPath = Field(Path("runs/run"), json_schema_extra=words("runs/NAME, of the recipe's file NAME.yaml"))
    """The run folder: resolved recipe, events, checkpoints, report."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, given: Any) -> Any:
        """Fills in defaults of `train` that depend on keys outside it; what is malformed is left to its own check."""
        if not isinstance(given, dict):
            return given
        train, max_length = given.get("train"), given.get("max_length", 0)
        train = {} if train is None else train
        filled = train.model_dump(exclude_unset=True) if isinstance(train, TrainConfig) else train
        if not isinstance(filled, dict) or not isinstance(max_length, int):
            return given
        filled = dict(filled)
        if given.get("adapter") is None:
            filled.setdefault("learning_rate", LEARNING_RATE_ALL_WEIGHTS)
        filled.setdefault("tokens_per_step", max(TOKENS_PER_STEP, max_length))
        if isinstance(filled["tokens_per_step"], int):
            filled.setdefault("tokens_per_pack", min(max(TOKENS_PER_PACK, max_length), filled["tokens_per_step"]))
        return {**given, "train": filled}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sizes = (self._step_clash(), self._pack_clash(), self._weights_clash())
        refuse(*self._method_clashes(), *sizes, *self._qat_clashes(), *self._shard_clashes())
        return self

    def _method_clashes(self) -> tuple[Clash | None, ...]:
        return self._sft_clashes() if self.method == "sft" else self._grpo_clashes()

    def _sft_clashes(self) -> tuple[Clash | None, ...]:
        given = [
            key
            for key in ("env", "reward", "rl")
            if key in self.model_fields_set and dict(self)[key] not in (None, RlConfig())
        ]
        return (
            Clash(("data",), "`data` is missing: the rows to train on") if self.data is None else None,
            Clash(
                ("eval.every", "eval.split", "eval.data"),
                "`eval.every` needs held-out rows; give `eval.split` or `eval.data`",
            )
            if self.eval.every and not self.has_eval
            else None,
            *(Clash((key, "method"), f"`{key}` is for `method: grpo`; this recipe's is sft") for key in given),
        )

    def _grpo_clashes(self) -> tuple[Clash | None, ...]:
        rl, no_steps = self.rl, self.train.steps is None
        both = self.env is not None and self.reward is not None
        neither = self.env is None and self.reward is None
        return (
            Clash(("env", "reward"), "`env` and `reward` are both given; keep one") if both else None,
            Clash(("env",), "`method: grpo` needs `env`, or `reward` with `data`") if neither else None,
            Clash(("data",), "`data` is missing: the prompts that `reward` judges the answers to")
            if self.reward is not None and self.data is None
            else None,
            Clash(("data", "env"), "`data` is for `reward`; an `env` brings its own tasks")
            if self.env is not None and self.data is not None
            else None,
            Clash(("eval.split", "eval.data"), "`eval.split` and `eval.data` are of `method: sft`; see `rl.eval_tasks`")
            if self.has_eval
            else None,
            Clash(("train.steps",), "`train.steps` is missing: `method: grpo` has no epochs") if no_steps else None,
            Clash(("parallel.ranks", "method"), "`parallel.ranks` is for `method: sft`; `grpo` is one process as yet")
            if self.parallel.ranks not in (1, "auto")
            else None,
            Clash(
                ("parallel.context", "method"), "`parallel.context` is for `method: sft`; `grpo` is one process as yet"
            )
            if self.parallel.context > 1
            else None,
            Clash(("rl.kl", "adapter"), "`rl.kl` needs an `adapter`: the reference is the model with it switched off")
            if rl.kl and self.adapter is None
            else None,
            Clash(("rl.rollout", "adapter"), "`rl.rollout` is a server, which is handed an `adapter`; there is none")
            if rl.rollout != "engine" and self.adapter is None
            else None,
            Clash(
                ("rl.max_new", "max_length"),
                f"`rl.max_new` is {rl.max_new}; it has to be below `max_length`, "
                f"{self.max_length}, which holds the prompt too",
            )
            if rl.max_new >= self.max_length
            else None,
        )

    def _step_clash(self) -> Clash | None:
        step, longest = self.train.tokens_per_step, self.max_length
        if step >= longest:
            return None
        why = f"`train.tokens_per_step` is {step}, below `max_length`, {longest}; a sample has to fit into a step"
        return Clash(("train.tokens_per_step", "max_length"), why)

    def _pack_clash(self) -> Clash | None:
        step, pack, longest = self.train.tokens_per_step, self.train.tokens_per_pack, self.max_length
        if longest <= pack <= step or step < longest:
            return None
        allowed = f"from `max_length`, {longest}, to `train.tokens_per_step`, {step}"
        other = "max_length" if pack < longest else "train.tokens_per_step"
        return Clash(("train.tokens_per_pack", other), f"`train.tokens_per_pack` is {pack}; it has to be {allowed}")

    def _weights_clash(self) -> Clash | None:
        if self.adapter is not None or self.weights not in ("mmap", "stream"):
            return None
        why = (
            f"`weights` is {self.weights}, which only reads the experts, but without `adapter` all weights are trained"
        )
        return Clash(("weights", "adapter"), f"{why}; add an `adapter` or write `weights: bf16`")

    def _shard_clashes(self) -> tuple[Clash | None, ...]:
        p = self.parallel
        if p.shard == "none" and p.offload:
            why = "`parallel.offload` is of parts of cut weights, and `parallel.shard` is none; leave one of them out"
            return (Clash(("parallel.offload", "parallel.shard"), why),)
        if p.shard != "all" and p.experts != "stay":
            return ()
        said = "parallel.experts" if p.experts == "stay" else "parallel.shard"
        if self.method == "grpo":
            why = f"`{said}` is for `method: sft`; `grpo` is one process as yet"
            return (Clash((said, "method"), why),)
        if p.shard == "none":
            why = "`parallel.experts` is stay, which cuts weights, and `parallel.shard` is none; leave one of them out"
            return (Clash((said, "parallel.shard"), why),)
        if p.experts == "stay" and self.qat is not None:
            return (Clash((said, "qat"), "`parallel.experts` is stay, and `qat` needs the experts gathered"),)
        if (key := self.keeps_weights_whole) is None:
            return ()
        word = p.experts if p.experts == "stay" else p.shard
        why = f"`{said}` is {word}, which cuts weights, and `{key}` goes with whole ones; leave one of them out"
        return (Clash((said, key.partition(":")[0]), why),)

    def _qat_clashes(self) -> tuple[Clash | None, ...]:
        if self.qat is None:
            return ()
        adapter, experts = self.adapter, TARGET_GROUPS["experts"]
        trains_experts = adapter is None or not adapter.by_target().keys().isdisjoint(experts)
        return (
            Clash(
                ("qat", "adapter.targets"),
                f"`qat` is {self.qat}, which rounds trained experts, but `adapter.targets` has none of them; add "
                f"`experts` ({' or '.join(experts)}), leave `adapter` out to train all weights, or leave out `qat`: "
                "experts that aren't trained keep their bytes in an export",
            )
            if not trains_experts
            else None,
            Clash(
                ("adapter.dropout", "qat"),
                "`adapter.dropout` zeroes inputs of adapters, but `qat` merges those of experts; set it to 0 or leave "
                "out `qat`",
            )
            if adapter is not None and adapter.dropout
            else None,
            Clash(
                ("rl.rollout", "qat"),
                "`rl.rollout` is a server, which samples with an unrounded adapter, not with what `qat` trains; sample "
                "with `engine`, or leave out `qat`",
            )
            if self.rl.rollout != "engine"
            else None,
        )

    @property
    def tokens_of_step(self) -> int:
        """Tokens of a step if every sample is as long as it may be; a sampled group's prompt counts once."""
        if self.method == "sft":
            return self.train.tokens_per_step
        return self.rl.prompts * (self.max_length - self.rl.max_new + self.rl.group * self.rl.max_new)

    @property
    def keeps_weights_whole(self) -> str | None:
        """The key and value that don't go with weights that are cut over ranks, if there is one."""
        if self.adapter is not None and self.weights in ("bf16", "mmap"):
            return f"weights: {self.weights}"
        if self.train.recompute == "never":
            return "train.recompute: never"
        return f"qat: {self.qat}" if self.qat is not None and self.adapter is None else None

    @property
    def offloads_parts(self) -> bool:
        """Whether, where weights are cut over ranks, a rank's parts wait in the machine's memory."""
        return self.parallel.offload or self.weights == "stream"

    @property
    def has_eval(self) -> bool:
        """Whether the recipe holds rows out."""
        return bool(self.eval.split or self.eval.data)

    @property
    def resume_command(self) -> str:
        """What goes on with this run once it was stopped."""
        return f"ossia train {self.output / 'recipe.yaml'} --resume"

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads it back as an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))
