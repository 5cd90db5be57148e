"""What each backend of attention says of itself, who is chosen, and the probes that a faulty one doesn't pass."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ossia.errors import UserError
from ossia.ops.attention import BACKENDS, Place, Segments, candidates, check_backend, pick_backend
from ossia.ops.attention.backends import ABILITIES
from ossia.ops.attention.probe import probe

CPU = torch.device("cpu")
HALF = torch.bfloat16
H100, T4 = (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place("cpu", torch.bfloat16, 64), "cpu"),
        (Place("cpu", torch.float16, 64), "reference"),
        (Place("cuda", torch.bfloat16, 64, H100), "flash"),
        (Place("cuda", torch.float16, 64, T4), "triton"),
        (Place("cuda", torch.float32, 64, H100), "triton"),
        (Place("cuda", torch.float32, 24, H100), "reference"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_that_its_record_allows(place: Place, expected: str) -> None:
    pytest.importorskip("triton", reason="pip install 'ossia[dev-gpu]'")
    assert pick_backend(place) == expected
    assert check_backend(pick_backend(place), place) == expected


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("flash", Place("cpu", HALF, 64), "runs on cuda, and this is cpu.*use cpu or reference; `auto` takes cpu"),
        (
            "cpu",
            Place("cpu", torch.float16, 64),
            "computes in float32 and bfloat16, and this is float16.*use reference",
        ),
        ("flash", Place("cuda", torch.float16, 64, T4), "capability 8.0 up to below 100.0, and this GPU has 7.5"),
        ("flash", Place("cuda", HALF, 20, H100), "heads are of .* numbers, and these of 20"),
        ("fa3", Place("cuda", HALF, 64, H100), "the package `flash_attn_interface`, which isn't installed.*use flash"),
        ("fa3", Place("cuda", HALF, 64, (12, 0)), "capability 9.0 up to below 10.0, and this GPU has 12.0"),
    ],
)
def test_a_backend_that_cannot_run_there_is_refused_with_one_that_can(name: str, place: Place, words: str) -> None:
    with pytest.raises(UserError, match=re.compile(words, re.DOTALL)):
        check_backend(name, place)


@pytest.mark.parametrize("ability", sorted(ABILITIES))
def test_a_backend_that_lacks_an_ability_says_so(ability: str) -> None:
    lacking = replace(BACKENDS["cpu"], knows=ABILITIES - {ability})
    assert ability in lacking.lacks(Place("cpu", HALF, 64))


def test_flash_attention_3_and_4_are_not_taken_unasked() -> None:
    assert not {"fa3", "fa4"} & {record.name for record in candidates(Place("cuda", HALF, 64, H100))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 64), (64, 8, 64), (3, 3, 24)])
def test_every_backend_that_can_run_here_passes_the_probes(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    able = candidates(Place("cpu", dtype, size))
    assert able
    for backend in able:
        found = probe(backend, CPU, dtype, heads=heads, kv_heads=kv_heads, size=size)
        assert found.problem is None
        assert found.leak == 0


def shortcut(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, segments: Segments, window: int | None, s: float
) -> Tensor:
    """Scaled outside, and the gradient through the log-sum-exp dropped: the right output and the wrong gradient."""
    seen = segments.doc_T[:, None] == segments.doc_T
    place = torch.arange(len(q))
    seen = seen & (place <= place[:, None]) & (place > place[:, None] - (window or len(q)))
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(len(sinks) // k.shape[1], 1)) * s
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(len(sinks) // v.shape[1], 1))
    return out * (scores.logsumexp(-1).detach() - sinks[:, None]).sigmoid().t()[..., None]


def leaking(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, segments: Segments, window: int | None, s: float) -> Tensor:
    """All documents as one."""
    whole = Segments(torch.tensor([0, segments.num_tokens]))
    return BACKENDS["reference"].attend(q, k, v, sinks, whole, window, s)


def silent(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, segments: Segments, window: int | None, s: float) -> Tensor:
    """Sinks that get no gradient of their own, and everything else right."""
    return BACKENDS["reference"].attend(q, k, v, sinks.detach() + 0 * sinks, segments, window, s)


def unwindowed(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, segments: Segments, window: int | None, s: float
) -> Tensor:
    """A window that isn't kept."""
    return BACKENDS["reference"].attend(q, k, v, sinks, segments, None, s)


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (shortcut, "or its gradient, is off by"),
        (silent, "or its gradient, is off by"),
        (unwindowed, "or its gradient, is off by"),
        (leaking, "documents of a pack see each other"),
    ],
)
def test_a_faulty_backend_does_not_pass_the_probes(attend: object, words: str) -> None:
    faulty = replace(BACKENDS["reference"], attend=attend)
    found = probe(faulty, CPU, torch.float32, heads=8, kv_heads=2, size=64)
    assert words in found.problem


def test_the_dropped_gradient_is_far_beyond_what_is_allowed_of_bfloat16() -> None:
    found = probe(replace(BACKENDS["reference"], attend=shortcut), CPU, torch.bfloat16, heads=8, kv_heads=2, size=64)
    assert found.error > 2 * found.allowed


def test_what_is_no_number_is_a_fault() -> None:
    definition = BACKENDS["reference"]
    nan = replace(definition, attend=lambda *given: definition.attend(*given) * torch.nan)
    assert probe(nan, CPU, torch.float32, heads=8, kv_heads=2, size=64).problem is not None
