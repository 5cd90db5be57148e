"""Generation with experts rounded to MXFP4, as `qat: mxfp4` trains them: every decoder, against the exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ossia.engine import Engine, Request, Sampling
from ossia.engine.request import Completion
from ossia.errors import UserError
from ossia.export import write_model
from ossia.model.lora import LoraSpec
from ossia.model.transformer import Transformer
from ossia.model.weights import EXPERT_WEIGHTS, Placement
from tests.conftest import MakeTiny
from tests.export.conftest import arch_of, random_lora
from tests.oracle.model_pairs import load
from tests.shapes import SHALLOW

EXPERTS_ALONE = LoraSpec(dict.fromkeys(EXPERT_WEIGHTS, (3, 6.0)))  # of the rest an export rounds to bfloat16
REQUESTS = [
    Request(ids=list(range(20, 20 + length)), sampling=Sampling(temperature=0.0), max_tokens=12) for length in (3, 17)
]


def answers(model: Transformer, decoder: str) -> list[Completion]:
    return Engine(model, decoder=decoder).generate(REQUESTS)


@pytest.mark.parametrize("decoder", ["native", "torch"])
@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("placement", ["mmap", "bf16"])
def test_an_adapter_is_sampled_from_as_it_will_be_exported(
    tiny: MakeTiny, tmp_path: Path, placement: Placement, layout: str, decoder: str
) -> None:
    path = tiny(SHALLOW, layout)
    model = load(path, placement=placement, lora=random_lora(arch_of(path), EXPERTS_ALONE, size=0.3))
    unrounded = answers(model, decoder)
    model.qat = True
    found = answers(model, decoder)
    write_model(tmp_path / "out", model, tokenizer_from=path, layout="mxfp4")
    expected = answers(load(tmp_path / "out", placement=placement), decoder)
    assert [one.ids for one in found] == [one.ids for one in expected]
    for one, other, before in zip(found, expected, unrounded, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)
        assert one.logprobs != before.logprobs


@pytest.mark.parametrize("decoder", ["native", "torch"])
def test_all_weights_are_sampled_from_as_they_will_be_exported(tiny: MakeTiny, tmp_path: Path, decoder: str) -> None:
    path = tiny(SHALLOW)
    model = load(path)
    model.qat = True
    model.train_all_weights()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.trainable.tensors.items():
        if name.endswith(EXPERT_WEIGHTS):
            tensor.mul_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    found = answers(model, decoder)
    write_model(tmp_path / "out", model, tokenizer_from=path, layout="mxfp4")
    for one, other in zip(found, answers(load(tmp_path / "out"), decoder), strict=True):
        assert one.ids == other.ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", ["native", "torch"])
def test_after_an_update_the_next_answer_is_of_the_weights_rounded_anew(tiny: MakeTiny, decoder: str) -> None:
    path = tiny(SHALLOW)
    model = load(path, lora=random_lora(arch_of(path), EXPERTS_ALONE, size=0.3))
    model.qat = True
    engine = Engine(model, decoder=decoder)
    before = engine.generate(REQUESTS)
    for tensor in model.trainable.tensors.values():
        tensor.mul_(-1.5)
    again = engine.generate(REQUESTS)
    assert [one.logprobs for one in before] != [one.logprobs for one in again]
    assert [one.logprobs for one in again] == [
        one.logprobs for one in Engine(model, decoder=decoder).generate(REQUESTS)
    ]


def test_another_adapter_beside_it_goes_without_the_decoder_that_holds_one(tiny: MakeTiny) -> None:
    path = tiny(SHALLOW)
    lora = random_lora(arch_of(path), EXPERTS_ALONE, size=0.3)
    model = load(path, lora=lora)
    model.qat = True
    with pytest.raises(UserError, match="merges one adapter"):
        Engine(model, adapters={"base": None}, decoder="native").generate(REQUESTS)
    beside = Engine(model, adapters={"base": None}).generate(REQUESTS)
    assert [one.ids for one in beside] == [one.ids for one in answers(model, "torch")]
