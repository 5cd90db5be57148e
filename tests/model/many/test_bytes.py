"""Bytes of a rank and bytes that travel, against what can be counted by hand and against a single GPU's budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ossia.errors import UserError
from ossia.model.arch import SHAPES
from ossia.model.budget.many.division import Division
from ossia.model.budget.many.fleet import adapter_bytes, merged_bytes, needed_bytes_s
from ossia.model.budget.many.links import ETHERNET, INFINIBAND, NVLINK_4
from ossia.model.budget.many.ranks import Whole, rank_bytes
from ossia.model.budget.many.traffic import traffic
from ossia.model.budget.work import Work
from ossia.model.lora import Lora, LoraSpec
from ossia.model.peft import save_adapter
from ossia.plan.memory import footprint

RANKS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 16) | dict.fromkeys(("gate_up_proj", "down_proj"), 8)
LORA = Work(SHAPES["20b"], "mxfp4", "resident", "cuda", "triton", "bfloat16", RANKS, pack=16_384, longest=4096)
FULL = replace(LORA, placement="bf16", ranks=None)
LARGE = replace(FULL, arch=SHAPES["120b"])


def test_one_gpu_of_many_has_what_one_gpu_has() -> None:
    alone, rank = footprint(LORA).device, rank_bytes(LORA, Division(1))
    assert rank.device["gradients"] == 4 * Whole.of(LORA).trained
    # all gradients are counted at once; the others stand in the plan
    own = {"gradients", "libraries' own", "allocator", "CUDA context"}
    assert {name: size for name, size in rank.device.items() if name not in own} == {
        name: size for name, size in alone.items() if name not in own
    }


@pytest.mark.parametrize(("work", "gpus"), [(LORA, 8), (FULL, 8), (LARGE, 64)])
def test_the_ranks_parts_add_up_to_the_whole(work: Work, gpus: int) -> None:
    whole, rank = Whole.of(work), rank_bytes(work, Division(gpus, shards=gpus, trained_shards=gpus)).device
    for name, bytes_each in (("trained, float32", 4), ("optimizer", 8), ("gradients", 4)):
        assert rank[name] * gpus == pytest.approx(bytes_each * whole.trained, rel=1e-6)
    weights = whole.layers * (whole.layer_dense + whole.layer_experts) + whole.table  # the embedding stays in its file
    assert rank.get("weights", 0) * gpus == pytest.approx(0 if work.ranks is None else weights, rel=1e-6)


def test_all_weights_are_16_bytes_a_number_and_two_layers_beside_them() -> None:
    rank = rank_bytes(FULL, Division(8, shards=8, trained_shards=8)).device
    state = sum(rank[name] for name in ("trained, float32", "optimizer", "gradients"))
    assert state == pytest.approx(16 * SHAPES["20b"].num_parameters() / 8, rel=1e-5)
    layer = (SHAPES["20b"].num_parameters() - 2 * 201_088 * 2880) / 24
    assert rank["gathered layers"] == pytest.approx(2 * 2 * layer, rel=1e-4)
    assert rank["part that is sent"] == pytest.approx(2 * layer / 8, rel=1e-4)
    assert rank["layers' gradients"] == pytest.approx(2 * 4 * layer, rel=1e-4)
    more = rank_bytes(FULL, Division(512, shards=512, trained_shards=512)).device
    assert more["gathered layers"] == rank["gathered layers"]


def test_what_waits_in_the_machines_memory_is_not_on_the_gpu() -> None:
    division = Division(16, shards=16, trained_shards=16)
    on_gpu, away = rank_bytes(LARGE, division), rank_bytes(LARGE, replace(division, offload=True))
    assert on_gpu.device_peak - away.device_peak == away.host_peak
    assert away.host_peak == pytest.approx(16 * SHAPES["120b"].num_parameters() / 16, rel=1e-5)
    frozen = Division(8, shards=8)
    on_gpu, away = rank_bytes(LORA, frozen), rank_bytes(LORA, replace(frozen, offload=True))
    assert away.host == {"weights": on_gpu.device["weights"]}
    assert on_gpu.device_peak - away.device_peak == away.host_peak


def test_experts_that_stay_put_are_divided_and_never_gathered() -> None:
    whole = Whole.of(LARGE)
    put = Division(64, shards=64, trained_shards=64, experts=64)
    assert rank_bytes(LARGE, put).device["gathered layers"] == 2 * (whole.layer_dense + whole.layer_experts // 64)
    gather = traffic(LARGE, put).layer.gather
    assert gather.total == pytest.approx(whole.layer_dense * 63 / 64)
    rows = 16_384 * 4 * 2880 * 2
    assert traffic(LARGE, put).parts["tokens to experts and back"].total == pytest.approx(
        rows * 63 / 64 * 2 * (36 * 2 + 35)  # there and back, forward and backward, and 35 layers computed again
    )


# --- what travels


def test_an_all_gather_crosses_to_a_machine_once_and_is_shared_inside() -> None:
    assert Division(8).gathered(800, 8) == (700, 0)
    assert Division(16).gathered(1600, 16) == (1500 - 100, 100)  # 800 come to the machine, 100 by each GPU's port
    assert Division(16).gathered(1600, 2, 8) == (0, 800)  # a rank and the one in the other machine
    assert Division(16).summed(1600, 2, 8) == (0, 1600)
    assert Division(2, per_machine=2).gathered(10, 2) == (5, 0)


@given(st.integers(0, 6), st.integers(0, 3), st.integers(1, 1 << 20))
def test_every_machine_gets_what_it_does_not_have_and_every_rank_all_but_its_own(n: int, log: int, size: int) -> None:
    number, per_machine = 1 << n, 1 << log
    spread = Division(number, per_machine=per_machine).gathered(size, number)
    machines = max(number // per_machine, 1)
    assert spread.total * number == pytest.approx(size * (number - 1))
    assert spread.outer * number == pytest.approx(machines * size * (1 - 1 / machines))


def test_an_all_to_all_sends_each_rank_its_part() -> None:
    assert Division(16).exchanged(1600, 16) == (700, 800)
    assert Division(16).exchanged(1600, 8) == (1400, 0)
    assert Division(16).exchanged(1600, 1) == (0, 0)


def test_with_a_replicated_base_only_the_adapters_gradients_travel() -> None:
    parts = traffic(LORA, Division(8)).parts
    assert list(parts) == ["adapters' gradients, summed"]
    assert parts["adapters' gradients, summed"].total == pytest.approx(2 * 7 / 8 * 4 * Whole.of(LORA).trained)


@pytest.mark.parametrize("work", [LORA, FULL])
def test_a_layer_is_gathered_once_a_direction_whatever_the_number_of_packs_is(work: Work) -> None:
    whole, division = Whole.of(work), Division(8, shards=8, trained_shards=1 if work.ranks else 8)
    layer = whole.layer_dense + whole.layer_experts
    once = traffic(work, division)
    layers, tables = (44, 1) if work.ranks else (47, 2)  # as tests/model/cut counts them
    assert once.parts["weights, gathered"].total == pytest.approx(7 / 8 * (layers * layer + tables * whole.table))
    assert traffic(replace(work, packs=9), division).parts == once.parts


def test_trained_weights_are_summed_in_float32_once_and_between_replicas_in_parts() -> None:
    numbers = 4 * Whole.of(FULL).trained
    inside = traffic(FULL, Division(8, shards=8, trained_shards=8)).parts["gradients, summed"]
    assert inside == pytest.approx((7 / 8 * numbers, 0))
    replicas = traffic(FULL, Division(64, shards=8, trained_shards=8)).parts["gradients, summed"]
    assert replicas == pytest.approx((7 / 8 * numbers, 2 * 7 / 8 * numbers / 8))


def test_a_divided_adapter_travels_as_much_as_its_gradients_are_summed() -> None:
    whole, division = Whole.of(LORA), Division(8, shards=8, trained_shards=8)
    gather = traffic(LORA, division).layer.gather.total
    layer = whole.layer_dense + whole.layer_experts + 2 * (whole.trained_dense + whole.trained_experts)
    assert gather == pytest.approx(7 / 8 * layer)
    assert traffic(LORA, division).layer.reduce.total == pytest.approx(
        7 / 8 * 4 * (whole.trained_dense + whole.trained_experts)
    )


def test_ranks_that_share_a_sequence_send_what_attention_needs_of_their_tokens_and_get_its_results() -> None:
    moved = traffic(LORA, Division(4, context=4))
    there, back = (64 + 2 * 8) * 64, 64 * 64
    assert moved.layer.exchanged.total == pytest.approx(16_384 * (there + back) * 2 * 3 / 4)
    assert moved.parts["tokens to heads and back"].total == pytest.approx(moved.layer.exchanged.total * (2 * 24 + 23))
    assert rank_bytes(LORA, Division(4, context=4)).device["heads on their way"] == 2 * 16_384 * there * 2


def test_a_shared_port_is_divided_by_the_gpus_of_a_machine() -> None:
    assert ETHERNET.bytes_s(8) == 12.5e9 / 8
    assert INFINIBAND.bytes_s(8) == 50e9
    division = Division(16)
    assert division.seconds(division.gathered(1600, 2, 8), NVLINK_4, ETHERNET) == pytest.approx(800 * 8 / 12.5e9)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"gpus": 12}, "gpus: 12; allowed: a multiple of the GPUs of a machine, 8, or fewer"),
        ({"gpus": 16, "shards": 3}, "shards: 3; allowed: a divisor of the GPUs, 16"),
        ({"gpus": 24, "trained_shards": 8, "experts": 3}, "trained shards: 8; allowed: a divisor or a multiple"),
    ],
)
def test_a_division_that_does_not_come_out_even_is_refused(more: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Division(**more)


# --- rollout servers


def test_an_adapter_is_as_large_as_the_file_that_a_run_writes(tmp_path: Path) -> None:
    arch = replace(SHAPES["demo"], num_layers=2, layer_types=SHAPES["demo"].layer_types[:2])
    spec = LoraSpec({target: (rank, 2.0 * rank) for target, rank in RANKS.items()}, 0.0)
    save_adapter(tmp_path / "a", Lora.fresh(arch, spec, seed=0, device=torch.device("cpu")), base_model="x")
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        written = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert adapter_bytes(replace(LORA, arch=arch)) == written


def test_merged_weights_are_the_checkpoint_and_servers_share_what_leaves_the_trainer() -> None:
    assert round(merged_bytes(SHAPES["120b"], "mxfp4") / 1e9, 2) == 65.25
    assert merged_bytes(SHAPES["20b"], "bf16") == 2 * SHAPES["20b"].num_parameters()
    assert needed_bytes_s(10**9, servers=16, step_s=60.0, share=0.01) == pytest.approx(16e9 / 0.6)


def test_a_copy_to_save_from_is_in_the_machines_memory_where_parts_of_all_weights_are_saved() -> None:
    cut = Division(8, shards=8, trained_shards=8)
    held = rank_bytes(FULL, cut).device["trained, float32"] // 4
    beside = rank_bytes(FULL, cut, saves_beside=True)
    assert beside.host["copy that is saved"] == 12 * held
    assert beside.device == rank_bytes(FULL, cut).device
    on_cpu = rank_bytes(replace(FULL, device="cpu"), cut, saves_beside=True)
    assert on_cpu.device["copy that is saved"] == 12 * held
    assert not on_cpu.host
    for work, division in ((FULL, Division(8)), (LORA, cut)):
        assert "copy that is saved" not in rank_bytes(work, division, saves_beside=True).host


def test_gloo_gathers_into_memory_of_its_own_and_sums_a_copy() -> None:
    full, lora = replace(FULL, device="cpu"), replace(LORA, device="cpu")
    cut = Division(8, shards=8, trained_shards=8)
    whole = Whole.of(full)
    parts = rank_bytes(full, cut).device
    assert parts["gloo, gathering"] == parts["gathered layers"] // 2
    assert parts["gloo, summing"] == parts["layers' gradients"] // 2 + (2 << 20)
    stays = rank_bytes(full, replace(cut, experts=8)).device
    assert stays["gloo, gathering"] == max(whole.layer_dense, whole.table)
    assert stays["gloo, summing"] == 4 * max(whole.trained_dense, whole.trained_tables // 2) + (2 << 20)
    assert rank_bytes(lora, Division(8, shards=8)).device["gloo, gathering"] > 0
    assert not any("gloo" in part for part in (*rank_bytes(lora, Division(8)).device, *rank_bytes(FULL, cut).device))
