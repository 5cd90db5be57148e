"""Before its first step a run tries attention on the device: a faulty kernel is replaced or refused, never used."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ossia.config import recipe_from_dict
from ossia.errors import RunError, UserError
from ossia.model.open import open_model
from ossia.ops.attention import BACKENDS, Segments
from ossia.run.attention import settle_attention
from ossia.run.start import started
from tests.conftest import MakeTiny
from tests.shapes import LEAST


def leaking(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, segments: Segments, *rest: Any) -> Tensor:
    return BACKENDS["reference"].attend(q, k, v, sinks, Segments(torch.tensor([0, segments.num_tokens])), *rest)


def test_auto_goes_on_with_the_next_backend_and_says_so(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = open_model(str(tiny(LEAST)), device="cpu")
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], attend=leaking))
    said: list[str] = []
    settle_attention(model, automatic=True, say=said.append)
    assert model.backend == "reference"
    assert said[0].startswith(
        "attention: cpu (torch's flash kernel for CPU) fails on this cpu: documents of a pack see"
    )
    assert said[1].startswith("attention: reference (the definition over all pairs of tokens); tried: documents apart")


def test_a_faulty_backend_that_was_asked_for_ends_the_run(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = open_model(str(tiny(LEAST)), device="cpu", attention="cpu")
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], attend=leaking))
    with pytest.raises(RunError, match=r"documents of a pack see each other.*\n  next: use reference"):
        settle_attention(model, automatic=False, say=print)


def test_a_run_says_what_computes_attention_and_how_near_it_is(
    tiny: MakeTiny, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "Anything at all."}) + "\n")
    keys = {"model": str(tiny(LEAST)), "data": {"path": str(rows)}, "adapter": {"rank": 1}, "device": "cpu"}
    recipe = recipe_from_dict({**keys, "attention": "reference", "output": str(tmp_path / "run")})
    with started(recipe, 1, resume=False, sink=None) as begun:
        assert (begun.model.backend, begun.model.probed.problem) == ("reference", None)
    assert "attention: reference (the definition over all pairs of tokens); tried:" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"flash .* can't be used here: it runs on cuda.*\n  next: use cpu or reference"
    ):
        open_model(str(tiny(LEAST)), device="cpu", attention="flash")
