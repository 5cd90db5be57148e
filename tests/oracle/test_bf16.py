"""bf16 beside bf16: a trained model's logits and gradients against those of transformers and peft, tensor by tensor.

Both round everywhere, each in its own places, so neither is the truth. That is float32, where both agree: we must be
hardly further from it than they are, and no further from them than rounding puts either. What is wrong by more than
rounding shows, also where only the bf16 path is wrong.

Ours are packed, theirs a batch with padding. `free` routers choose for themselves; `held` ones choose in both programs
what float32 chose, so that the bounds are close (see held_routers.py). For gradients the clamp is set where it bites:
at 7 no activation of so small a model reaches it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from ossia.data.pack import Pack
from ossia.data.sample import Sample
from ossia.model.arch import Arch, Layout
from ossia.model.checkpoint import Checkpoint, write_checkpoint
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import load_adapter, save_adapter
from ossia.model.transformer import Transformer
from ossia.model.weights import EXPERT_WEIGHTS
from ossia.ops.mxfp4 import quantize_mxfp4
from ossia.train.schedule import forward_logprobs, prepares_layers
from tests.oracle.held_routers import held, hold_in_transformers, recorded
from tests.oracle.model_pairs import (
    CPU,
    Batch,
    cosine,
    gradients_of,
    held_out,
    in_our_layout,
    load,
    load_transformers,
    pack_of,
    relative_error,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:::peft")
CLAMP = 2.5  # 2 % of the gates and 3 % of the ups are beyond it
ADAPTER = LoraSpec(dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", *EXPERT_WEIGHTS), (4, 8.0)))


# --- logits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Logits:
    """Of every token of 60 held-out conversations, (T, V); `counted_T` are those whose prediction is trained."""

    exact: Tensor
    ours: Tensor
    theirs: Tensor
    counted_T: Tensor
    routers: str


@pytest.fixture(scope="module", params=["free", "held"])
def logits(request: pytest.FixtureRequest, trained: Path) -> Logits:
    samples = held_out(trained, 60)
    pack, batch = pack_of(samples), Batch.of(samples)
    reference = load_transformers(trained, torch.bfloat16)
    with recorded() as chosen:
        exact = load(trained).logits(pack)
    if request.param == "held":
        hold_in_transformers(reference, chosen, batch)
    with held(chosen) if request.param == "held" else nullcontext():
        ours = load(trained, torch.bfloat16).logits(pack)
    with torch.no_grad():
        theirs = reference(batch.ids, attention_mask=batch.mask).logits[batch.mask > 0]
    return Logits(exact, ours, theirs, pack.weights > 0, request.param)


def row_errors(found_TV: Tensor, exact_TV: Tensor) -> Tensor:
    return (found_TV - exact_TV).norm(dim=-1) / exact_TV.norm(dim=-1)


def test_packed_logits_are_as_close_to_float32_as_those_of_a_padded_batch_in_transformers(logits: Logits) -> None:
    ours, theirs = (row_errors(found, logits.exact) for found in (logits.ours, logits.theirs))
    assert float(ours.median()) <= 1.2 * float(theirs.median()) <= 0.01
    ours, theirs = (relative_error(found, logits.exact) for found in (logits.ours, logits.theirs))
    if logits.routers == "held":
        assert ours <= 1.2 * theirs <= 0.01
        assert relative_error(logits.ours, logits.theirs) <= 1.5 * theirs
    else:  # the few rows where another expert was taken are most of it
        assert ours <= 2.5 * theirs <= 0.1


def test_on_held_out_conversations_bf16_predicts_what_float32_predicts(logits: Logits) -> None:
    exact_RV = logits.exact[logits.counted_T]
    sure_R = exact_RV.softmax(-1).amax(-1) > 0.7
    assert float(sure_R.float().mean()) > 0.5, "the model hasn't learnt enough"
    for found_TV in (logits.ours, logits.theirs):
        same_R = found_TV[logits.counted_T].argmax(-1) == exact_RV.argmax(-1)
        assert float(same_R.float().mean()) > 0.985
        # the model that is trained here differs from one kind of processor to the next, and so does who flips a router
        assert float(same_R[sure_R].float().mean()) > 0.998


@pytest.mark.parametrize("logits", ["free"], indirect=True)
def test_a_tokens_log_probability_is_as_exact_as_in_transformers(trained: Path, logits: Logits) -> None:
    pack = pack_of(held_out(trained, 60))
    targets_R1 = pack.targets[logits.counted_T, None]
    exact_R, theirs_R = (
        x[logits.counted_T].float().log_softmax(-1).gather(-1, targets_R1)[:, 0] for x in (logits.exact, logits.theirs)
    )
    (ours_R,) = forward_logprobs(load(trained, torch.bfloat16), [pack])
    assert bool((ours_R <= 0).all()), "a probability above 1"
    ours_off_R, theirs_off_R = (ours_R - exact_R).abs(), (theirs_R - exact_R).abs()
    assert float(ours_off_R.median()) <= 1.5 * float(theirs_off_R.median())
    assert float(ours_off_R.mean()) <= 2.0 * float(theirs_off_R.mean())


def test_in_bf16_too_a_conversation_has_the_same_logits_in_a_pack_as_alone(trained: Path) -> None:
    samples, model = held_out(trained, 20), load(trained, torch.bfloat16)
    alone = torch.cat([model.logits(pack_of([sample])) for sample in samples])
    errors = row_errors(model.logits(pack_of(samples)).float(), alone.float())
    assert float(errors.median()) <= 2e-3
    assert float(errors.mean()) <= 5e-3  # other tiles sum in another order, which may take another expert, too


# --- gradients ----------------------------------------------------------------------------------------------------


def with_biting_clamp(trained: Path, target: Path, layout: Layout) -> Path:
    """The trained weights in a folder of their own, in either layout (MXFP4 rounds the experts)."""
    source = Checkpoint.open(trained)
    arch = replace(source.arch, swiglu_limit=CLAMP)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in source.specs:
            if layout == "mxfp4" and name.endswith(EXPERT_WEIGHTS):
                blocks, scales = quantize_mxfp4(source.tensor(name).transpose(1, 2))
                yield from ((f"{name}_blocks", blocks), (f"{name}_scales", scales))
            else:
                yield name, source.tensor(name)

    write_checkpoint(target, arch, tensors(), layout, tokenizer_from=trained)
    return target


def some_adapter(arch: Arch) -> Lora:
    """An adapter as training leaves it after a while: B is small and not zero. Its numbers are bf16's own."""
    lora = Lora.fresh(arch, ADAPTER, seed=1, device=CPU)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in lora.trainable.tensors.items():
        if name.endswith("lora_B"):
            tensor.normal_(std=0.02, generator=generator)
        tensor.copy_(tensor.bfloat16())
    return lora


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, an adapter or all weights, and on what; the exact gradient and the experts that it went by."""

    path: Path
    adapter: Path | None
    samples: list[Sample]
    packs: list[Pack]
    exact: dict[str, Tensor] = field(default_factory=dict)
    chosen: list[Tensor] = field(default_factory=list)

    def ours(self, dtype: torch.dtype) -> Transformer:
        model = load(self.path, dtype)
        if self.adapter is None:
            model.train_all_weights()
        else:
            model.use_adapter(some_adapter(model.arch))
        return model

    def theirs(self, dtype: torch.dtype, folder: Path, *, hold_routers: bool = False) -> dict[str, Tensor]:
        """The gradients of a padded batch in transformers or peft, under our names and in our layout."""
        model, batch = load_transformers(self.path, dtype), Batch.of(self.samples)
        if self.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(self.adapter), is_trainable=True)
        if hold_routers:
            hold_in_transformers(model, self.chosen, batch)
        batch.loss(model).backward()
        if self.adapter is None:
            return {name: in_our_layout(name, parameter.grad) for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.copy_(parameter.grad)
        model.save_pretrained(str(folder))  # as if they were an adapter
        return load_adapter(folder, Checkpoint.open(self.path).arch, CPU).trainable.tensors


@pytest.fixture(scope="module", params=["all weights", "adapter"])
def case(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """All weights of a bf16 checkpoint, or an adapter on an MXFP4 one; 20 conversations in four packs."""
    folder = tmp_path_factory.mktemp("biting")
    adapter = folder / "adapter" if request.param == "adapter" else None
    path = with_biting_clamp(trained, folder / "model", "bf16" if adapter is None else "mxfp4")
    if adapter is not None:
        save_adapter(adapter, some_adapter(Checkpoint.open(path).arch), base_model=str(path))
    samples = held_out(trained, 20)
    found = Case(path, adapter, samples, [pack_of(samples[i : i + 5]) for i in range(0, 20, 5)])
    with recorded() as chosen:
        _, exact = gradients_of(model := found.ours(torch.float32), found.packs, recompute=False)
    if not prepares_layers(model):  # recorded pack by pack, in each layer by layer
        num_layers = model.arch.num_layers
        chosen = [one for layer in range(num_layers) for one in chosen[layer::num_layers]]
    return replace(found, exact=exact, chosen=chosen)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of one loss: in float32, ours in bf16, theirs in bf16."""

    exact: dict[str, Tensor]
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    routers: str

    def by_tensor(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for name, exact in self.exact.items():
            yield name, exact, self.ours[name], self.theirs[name]

    def by_kind(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """The same tensor of all layers in one, every layer with the same weight."""
        kinds: dict[str, list[list[Tensor]]] = {}
        for name, *tensors in self.by_tensor():
            size = tensors[0].norm()
            kinds.setdefault(re.sub(r"layers\.\d+\.", "", name), []).append([x.flatten() / size for x in tensors])
        for kind, layers in kinds.items():
            yield kind, *(torch.cat(parts) for parts in zip(*layers, strict=True))


@pytest.fixture(scope="module", params=["free", "held"])
def gradients(request: pytest.FixtureRequest, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    hold = request.param == "held"
    with held(case.chosen) if hold else nullcontext():
        _, ours = gradients_of(case.ours(torch.bfloat16), case.packs, recompute=False)
    theirs = case.theirs(torch.bfloat16, tmp_path_factory.mktemp("gradients"), hold_routers=hold)
    assert set(ours) == set(theirs) == set(case.exact)
    return Gradients(case.exact, ours, theirs, request.param)


def test_float32_is_the_truth_because_transformers_has_the_same_gradient(case: Case, tmp_path: Path) -> None:
    for name, theirs in case.theirs(torch.float32, tmp_path).items():
        # 7e-6 and less but where an activation lies so close to the clamp that only one of the two clamps it: 1.2e-4
        assert relative_error(theirs, case.exact[name]) <= 4e-4, name


def test_no_tensors_gradient_is_much_further_from_float32_than_in_transformers(gradients: Gradients) -> None:
    off = {name: relative_error(theirs, exact) for name, exact, _, theirs in gradients.by_tensor()}
    usual = median(off.values())  # in a tensor of four numbers they may be right by luck
    # three sets of 20 conversations gave at most 1.9 with held routers, and 3.1 with free ones
    factor, least_cosine = (2.5, 0.97) if gradients.routers == "held" else (5.0, 0.9)
    for name, exact, ours, theirs in gradients.by_tensor():
        allowed = factor * max(off[name], usual)
        assert relative_error(ours, exact) <= allowed, name
        assert relative_error(ours, theirs) <= allowed, name
        assert cosine(ours, exact) >= least_cosine, name


def test_over_all_layers_gradients_are_as_close_to_float32_as_in_transformers(gradients: Gradients) -> None:
    # three sets of 20 conversations gave at most 1.43 with held routers (the head; 1.3 elsewhere), 2.7 with free ones
    factor = 1.8 if gradients.routers == "held" else 4.0
    for kind, exact, ours, theirs in gradients.by_kind():
        if len(exact) > 100:  # the sinks of all layers are 16 numbers, too few to speak of averages
            allowed = factor * relative_error(theirs, exact)
            assert relative_error(ours, exact) <= allowed, kind
            assert relative_error(ours, theirs) <= allowed, kind


def test_the_gradient_of_a_step_is_the_float32_sum_of_its_micro_batches(case: Case) -> None:
    model, packs = case.ours(torch.bfloat16), [pack_of([sample]) for sample in case.samples[:5]]
    _, together = gradients_of(model, packs, recompute=False, denominator=1000.0)
    one_by_one = [gradients_of(model, [pack], recompute=False, denominator=1000.0)[1] for pack in packs]
    for name, grad in together.items():
        assert torch.equal(grad, sum(grads[name] for grads in one_by_one)), name
