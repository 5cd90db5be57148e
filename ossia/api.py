"""Ossia from Python: `ossia.load(...)` to use a model, `ossia.train(...)` to make one.

```python
model = ossia.load("openai/gpt-oss-20b", adapter="runs/my-run")
reply = model.chat([{"role": "user", "content": "Sort 314159."}], reasoning_effort="low")
print(reply.thinking, reply.content)
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossia import grpo, sft
from ossia.config import Recipe, check_recipe, checked_recipe
from ossia.engine import Completion, Engine, Finish, Request, Sampling, harmony_stops
from ossia.errors import RecipeError
from ossia.harmony import Effort, Message, Renderer, Vocabulary, conversation_from_messages, parse_completion
from ossia.model.open import DeviceChoice, DtypeName, WeightsChoice, open_model
from ossia.model.transformer import Transformer
from ossia.run.trained import RunResult
from ossia.train.ranks.launched import launched


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered, taken apart.

    content     text of the final answer; commentary that came before a call where there is none; "" if there is nothing
    thinking    text of the analysis
    tool_calls  OpenAI's form: {"id", "type": "function", "function": {"name", "arguments"}}
    message     all of it as one OpenAI assistant message, to append to the messages and go on
    finish      "stop" or "length"
    ids, logprobs  the sampled tokens, the stop included, and ln p of each under the model itself
    """

    content: str
    thinking: str
    tool_calls: list[dict[str, Any]]
    message: dict[str, Any]
    finish: Finish
    ids: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, vocab: Vocabulary, completion: Completion) -> Reply:
        """From sampled ids that follow `<|start|>assistant`."""
        messages = [message for message in parse_completion(vocab, completion.ids) if message.role == "assistant"]
        calls = [
            {"id": f"call_{n}", "type": "function", "function": _function(message)}
            for n, message in enumerate((m for m in messages if m.recipient is not None), start=1)
        ]
        texts = [message for message in messages if message.recipient is None]
        thinking = "\n\n".join(message.content for message in texts if message.channel == "analysis")
        answer = [message.content for message in texts if message.channel not in ("analysis", "commentary")]
        content = "\n\n".join(answer or [message.content for message in texts if message.channel == "commentary"])
        row: dict[str, Any] = {"role": "assistant", "content": content or (None if calls or thinking else "")}
        row |= {"reasoning_content": thinking} if thinking else {}
        row |= {"tool_calls": calls} if calls else {}
        return cls(content, thinking, calls, row, completion.finish, completion.ids, completion.logprobs)


def _function(message: Message) -> dict[str, str]:
    assert message.recipient is not None
    return {"name": message.recipient.removeprefix("functions."), "arguments": message.content}


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to use. `load` makes it."""

    transformer: Transformer
    vocabulary: Vocabulary

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        developer: str | None = None,
        reasoning_effort: Effort | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 4096,
        seed: int | None = None,
    ) -> Reply:
        """The answer to an OpenAI chat.

        seed    the same seed gives the same answer; None: another one each time
        Raises  HarmonyError naming the field of a message that can't be read, UserError for a setting out of range
        """
        conversation = conversation_from_messages(
            messages, tools=tools, developer=developer, reasoning_effort=reasoning_effort
        )
        ids = Renderer(self.vocabulary).completion(conversation)
        sampling = Sampling(temperature, top_p, top_k, min_p, seed)
        (completion,) = self.generate([ids], sampling=sampling, max_tokens=max_tokens)
        return Reply.of(self.vocabulary, completion)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 1024,
        max_batch: int = 64,
    ) -> list[Completion]:
        """Continue prompts, many at once; each ends at `<|return|>`, `<|call|>` or `<|endoftext|>`, or at max_tokens.

        prompts   ids, or plain text, which is encoded as it stands: no Harmony around it, no special token in it
        sampling  of every prompt; with a seed, prompt n draws from seed + n
        Raises    UserError for an empty prompt, one that is too long, or an id that the model doesn't have
        """
        rules, stops = sampling or Sampling(), harmony_stops(self.vocabulary)
        requests = []
        for number, prompt in enumerate(prompts):
            ids = self.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
            seed = None if rules.seed is None else rules.seed + number
            own = Sampling(rules.temperature, rules.top_p, rules.top_k, rules.min_p, seed)
            requests.append(Request(ids, own, max_tokens, stops))
        return Engine(self.transformer, max_batch=max_batch).generate(requests)


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: DtypeName = "bfloat16",
    weights: WeightsChoice = "auto",
    device: DeviceChoice = "auto",
) -> Model:
    """Open a model to use it.

    model    a checkpoint's folder, owner/name on the Hugging Face hub, or a run folder: what it trained
    adapter  a run folder, or a folder in PEFT's format
    weights  where the weights are, as in a recipe
    Raises   CheckpointError, TokenizerError, AdapterError, MissingExtraError
    """
    return Model(*open_model(str(model), adapter=adapter, dtype=dtype, weights=weights, device=device))


def train(recipe: Recipe | Mapping[str, Any] | str | Path, *, resume: bool = False) -> RunResult:
    """Train as a recipe says: a Recipe, its keys as a dict, or its file.

    resume   go on with the run in the recipe's output folder; so does a process that torchrun has restarted
    Returns  the run: `.folder`, `.step`, and `.trained`, the adapter's or the model's folder
    Raises   RecipeError for whatever is wrong with the recipe; what `ossia train` reports otherwise
    """
    if not isinstance(recipe, Recipe | Mapping | str | Path):
        found = type(recipe).__name__
        raise RecipeError(f"ossia.train takes a recipe's file, its keys as a dict, or a Recipe; found {found}")
    lenient = resume or launched() is not None  # ranks that were started again go on; they know once they have met
    if isinstance(recipe, Recipe):
        check_recipe(recipe, resume=lenient)
    else:
        recipe = checked_recipe(Path(recipe) if isinstance(recipe, str) else recipe, resume=lenient)
    return run_recipe(recipe, resume=resume)


def run_recipe(recipe: Recipe, *, resume: bool = False) -> RunResult:
    """Train as a recipe that was checked says, by its method. Raises as `train`."""
    return {"sft": sft.run, "grpo": grpo.run}[recipe.method](recipe, resume=resume)
