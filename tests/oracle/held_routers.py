"""Routers that take the experts which other routers took, in Ossia and in transformers.

Where two experts are nearly equal, rounding chooses, and one other choice outweighs all other rounding. With the
choices held at those of float32, what is left of bf16 is its arithmetic.
Letters: T tokens, E experts, K experts a token, R rows that were routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ossia.model import transformer
from ossia.ops.moe import Route, Sort, route
from tests.oracle.model_pairs import Batch


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """What our routers choose in here, (R, K) a call: layer by layer, in each layer pack by pack."""
    chosen: list[Tensor] = []

    def choose(logits_TE: Tensor, top_k: int, replay_TK: Tensor | None, sort: Sort) -> Route:
        routing = route(logits_TE, top_k, replay_TK, sort)
        chosen.append(routing.experts_TK)
        return routing

    with _our_routers(choose):
        yield chosen


@contextmanager
def held(chosen: Sequence[Tensor]) -> Iterator[None]:
    """Our routers choose in here what was recorded, call by call; how much each expert counts they decide anew."""
    left = iter(chosen)
    with _our_routers(lambda logits_TE, top_k, _, sort: route(logits_TE, top_k, next(left), sort)):
        yield
    assert next(left, None) is None, "fewer calls than were recorded"


@contextmanager
def _our_routers(choose: Callable[[Tensor, int, Tensor | None, Sort], Route]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "route", choose)
        yield


def hold_in_transformers(model: torch.nn.Module, chosen: Sequence[Tensor], batch: Batch) -> None:
    """transformers' routers choose, for the rows of `batch`, what ours chose for the same samples in the same order."""
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.router")]
    num_packs = len(chosen) // len(routers)
    for layer, router in enumerate(routers):
        chosen_RK = torch.cat(list(chosen[layer * num_packs : (layer + 1) * num_packs]))
        rows_T = batch.mask.flatten() > 0
        if len(chosen_RK) < rows_T.sum():  # a step's last layer, where we only route the rows that count
            rows_T = batch.weights.flatten() > 0
        router.register_forward_hook(_taking(rows_T, chosen_RK))


def _taking(rows_T: Tensor, chosen_RK: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def hook(
        _module: torch.nn.Module, _inputs: tuple[Tensor], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, _, experts_TK = output
        experts_TK = experts_TK.index_put((rows_T,), chosen_RK)
        return logits_TE, logits_TE.gather(-1, experts_TK).softmax(-1), experts_TK

    return hook
