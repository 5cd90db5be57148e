"""Whether an exported model is the model that was meant: logits of both on the same texts, in float32.

Both are computed by Ossia from what is on disk, the one from base and adapter, the other from the exported folder read
back, so what remains is the rounding of the changed weights and whatever went wrong. One layer is expanded at a time.
Letters: T tokens, R rows at a time, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ossia.config import Recipe
from ossia.data.dataset import in_order, open_datasets
from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.errors import DataError, MissingExtraError
from ossia.export.merge import Changes
from ossia.harmony import Renderer, Vocabulary, conversation_from_messages
from ossia.model.checkpoint import Checkpoint
from ossia.model.transformer import Transformer
from ossia.model.weights import Trainable, Weights
from ossia.ops.linear import Linear, linear

TEXTS, TOKENS_EACH = 4, 256
_ROWS, _VOCAB_BLOCK = 64, 8192
_CHATS = (
    ("What is the capital of France?", "The user asks for a capital.", "Paris is the capital of France."),
    ("Add 17 and 25.", "17 + 25 = 42.", "17 + 25 is 42."),
    ("Write a line of Python that squares x.", "Simple.", "`y = x ** 2`"),
    ("Sort these words: pear, fig, apple.", "Alphabetical order: apple, fig, pear.", "apple, fig, pear"),
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one model's next-token distributions are from another's.

    positions  compared
    max_abs    largest difference of two logits
    kl         mean KL divergence, nats, of the found distribution from the expected one
    median_kl  its median, which a few tokens that a router sent elsewhere don't move
    top1       share of positions with the same likeliest token
    """

    positions: int
    max_abs: float
    kl: float
    median_kl: float
    top1: float

    def __str__(self) -> str:
        return (
            f"max |logit difference| {self.max_abs:.2e}, KL {self.kl:.2e} nats (median {self.median_kl:.2e}), "
            f"same top-1 at {self.top1:.1%} of {self.positions:,} positions"
        )


def changed_model(base: Checkpoint, changes: Changes | None = None) -> Transformer:
    """A model in float32 whose weights stay in their files, with what training changed."""
    weights = Weights(base, "mmap", torch.float32, torch.device("cpu"))
    model = Transformer(
        weights, lora=None if changes is None else changes.lora, qat=changes is not None and changes.qat
    )
    if changes is not None and changes.tensors:
        model.trainable = Trainable(changes.tensors)
    return model


@torch.no_grad()
def compare(expected: Transformer, others: Sequence[Transformer], packs: Sequence[Pack]) -> list[Agreement]:
    """Each of the others against the expected model, at every position of the packs; 64 rows of logits at once."""
    tallies = [_Tally() for _ in others]
    for pack in packs:
        want_T, *have_T = [model.hidden(pack).split(_ROWS) for model in (expected, *others)]
        for number, h_RD in enumerate(want_T):
            want_RV = _logits(expected, h_RD)
            for tally, model, states in zip(tallies, others, have_T, strict=True):
                tally.add(want_RV, _logits(model, states[number]))
    return [tally.result() for tally in tallies]


class _Tally:
    """One comparison as it grows."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._max_abs: list[Tensor] = []

    def add(self, want_RV: Tensor, have_RV: Tensor) -> None:
        self._max_abs.append((want_RV - have_RV).abs().max())
        self._same.append(want_RV.argmax(-1) == have_RV.argmax(-1))
        log_p, log_q = want_RV.log_softmax(-1), have_RV.log_softmax(-1)
        self._kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))

    def result(self) -> Agreement:
        kl, same, max_abs = torch.cat(self._kl), torch.cat(self._same), torch.stack(self._max_abs).max()
        return Agreement(len(kl), float(max_abs), float(kl.mean()), float(kl.median()), float(same.float().mean()))


def _logits(model: Transformer, h_RD: Tensor) -> Tensor:
    """(R, V) float32; the head is expanded in blocks."""
    name = "lm_head.weight"
    head_VD = model.trainable.tensors[name] if name in model.trainable else model.weights.raw(name)
    a_rD, b_Vr = (None, None) if model.lora is None else model.lora.pair("lm_head", torch.float32)
    blocks = []
    for start in range(0, len(head_VD), _VOCAB_BLOCK):
        rows = slice(start, start + _VOCAB_BLOCK)
        blocks.append(linear(h_RD, Linear(head_VD[rows].float(), None, a_rD, None if b_Vr is None else b_Vr[rows])))
    return torch.cat(blocks, dim=-1)


def held_out_texts(recipe: Recipe, vocab: Vocabulary) -> list[Pack]:
    """The first held-out samples of a run; [] where it holds none out, or its data isn't here any more."""
    if not recipe.has_eval:
        return []
    try:
        return _packs(in_order(open_datasets(recipe, vocab).held_out))
    except (DataError, MissingExtraError):
        return []


def fixed_texts(vocab: Vocabulary) -> list[Pack]:
    """Four short conversations."""
    return _packs(_rendered(vocab))


def _rendered(vocab: Vocabulary) -> Iterator[Sample]:
    renderer = Renderer(vocab)
    for number, (question, thinking, answer) in enumerate(_CHATS):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "thinking": thinking, "content": answer}]
        for rendered in renderer.samples(conversation_from_messages(chat)):
            yield Sample.from_rendered(rendered, f"fixed text {number + 1}")


def _packs(samples: Iterable[Sample]) -> list[Pack]:
    return [Pack.from_samples([sample.truncated(TOKENS_EACH)]) for sample in islice(samples, TEXTS)]
