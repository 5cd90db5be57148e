"""Single keys of Axolotl's: what they become, and that nothing is lost on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ossia.axolotl import Imported, import_axolotl
from ossia.axolotl.keys import KNOWN
from ossia.cli import app
from ossia.config.yaml_lines import dump_yaml
from ossia.errors import RecipeError

BASE: dict[str, Any] = {
    "base_model": "openai/gpt-oss-20b",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "sequence_len": 1024,
    "micro_batch_size": 2,
    "sample_packing": True,
    "learning_rate": 1e-4,
}
GRPO = {"rl": "grpo", "max_steps": 50, "micro_batch_size": 16, "adapter": "lora", "lora_target_linear": True}
LORA = {"adapter": "lora", "lora_r": 4}


def imported(**changes: Any) -> Imported:
    return import_axolotl(dump_yaml({**BASE, **changes}), "config.yaml")


def dataset(**changes: Any) -> Imported:
    return imported(datasets=[{**BASE["datasets"][0], **changes}])


def verdict(found: Imported, key: str) -> tuple[str, str]:
    (one,) = [one for one in found.verdicts if one.key == key]
    return one.fate.value, one.words


def at(found: Imported, key: str) -> Any:
    """A value of the loaded recipe by its dotted key."""
    value: Any = found.recipe.model_dump(mode="json")
    for piece in key.split("."):
        value = value[int(piece) if isinstance(value, list) else piece]
    return value


@pytest.mark.parametrize(
    ("key", "value", "ours", "becomes"),
    [
        ("max_steps", 200, "train.steps", 200),
        ("num_epochs", 3, "train.epochs", 3.0),
        ("micro_batch_size", 4, "train.tokens_per_step", 4096),
        ("gradient_accumulation_steps", 8, "train.tokens_per_step", 16384),
        ("batch_size", 8, "train.tokens_per_step", 8192),
        ("learning_rate", "2e-4", "train.learning_rate", 2e-4),
        ("weight_decay", 0.1, "train.weight_decay", 0.1),
        ("adam_beta2", 0.95, "train.beta2", 0.95),
        ("adam_epsilon", 1e-6, "train.eps", 1e-6),
        ("max_grad_norm", 0.5, "train.clip", 0.5),
        ("max_grad_norm", 0, "train.clip", None),
        ("lr_scheduler", "linear", "train.schedule", "linear"),
        ("cosine_min_lr_ratio", 0.1, "train.min_lr_ratio", 0.1),
        ("warmup_steps", 10, "train.warmup", 10.0),
        ("seed", 7, "train.seed", 7),
        ("bf16", "auto", "dtype", "bfloat16"),
        ("fp16", True, "dtype", "float16"),
        ("bf16", False, "dtype", "float32"),
        ("excess_length_strategy", "raise", "on_long", "error"),
        ("val_set_size", 0.05, "eval.split", 0.05),
        ("save_steps", 25, "train.save_every", 25),
        ("save_strategy", "no", "train.save_every", 0),
        ("save_total_limit", 5, "train.keep", 5),
        ("output_dir", "./outputs/x/", "output", "outputs/x"),
        ("wandb_project", "mine", "log.sinks", ["wandb"]),
        ("use_tensorboard", True, "log.sinks", ["tensorboard"]),
        ("chat_template_kwargs", {"reasoning_effort": "high"}, "harmony.reasoning_effort", "high"),
        ("default_system_message", "Be short.", "data.0.developer", "Be short."),
        ("qat", {"weight_dtype": "mxfp4"}, "qat", "mxfp4"),
        ("dp_replicate_size", 4, "train.tokens_per_step", 8192),
    ],
)
def test_a_key_is_mapped(key: str, value: Any, ours: str, becomes: Any) -> None:
    found = imported(**{key: value})
    assert at(found, ours) == becomes
    inner = f"{key}.{next(iter(value))}" if isinstance(value, dict) else key
    assert verdict(found, inner)[0] == "mapped"


@pytest.mark.parametrize(
    ("changes", "ours", "becomes"),
    [
        ({"lora_alpha": 8}, "adapter.alpha", 8.0),
        ({"lora_dropout": 0.1}, "adapter.dropout", 0.1),
        ({"peft_use_rslora": True}, "adapter.rslora", True),
        ({"lora_model_dir": "before"}, "adapter.init_from", "before"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "adapter.targets", ["q_proj", "v_proj"]),
        ({"lora_target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj)"}, "adapter.targets", ["attention"]),
        (
            {
                "lora_target_linear": True,
                "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
            "adapter.targets",
            ["attention", "experts"],
        ),
        (
            {"lora_target_modules": ["q_proj", "lm_head"], "lora_rank_pattern": {"lm_head": 2}},
            "adapter.targets.lm_head.rank",
            2,
        ),
    ],
)
def test_an_adapter_is_mapped(changes: dict[str, Any], ours: str, becomes: Any) -> None:
    found = imported(**LORA, **changes)
    assert at(found, ours) == becomes
    assert {one.fate.value for one in found.verdicts if one.key.startswith(("lora", "peft"))} == {"mapped"}


def test_a_target_in_single_layers_says_that_it_is_every_layer() -> None:
    found = imported(**LORA, lora_target_parameters=["22._checkpoint_wrapped_module.mlp.experts.down_proj"])
    assert at(found, "adapter.targets") == ["down_proj"]
    assert "every layer" in verdict(found, "lora_target_parameters")[1]


def test_a_target_that_ossia_lacks_is_named() -> None:
    found = imported(**LORA, lora_target_modules=["q_proj", "embed_tokens"])
    assert at(found, "adapter.targets") == ["q_proj"]
    fate, words = verdict(found, "lora_target_modules")
    assert fate == "not supported"
    assert "embed_tokens" in words


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({"field_messages": "turns"}, {"format": "messages", "columns": {"messages": "turns"}}),
        ({"field_messages": "messages", "field_thinking": "reasoning"}, {"format": "messages", "columns": {}}),
        (
            {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}},
            {"format": "sharegpt", "columns": {}},
        ),
        (
            {"message_property_mappings": {"role": "from", "content": "value"}},
            {"format": "sharegpt", "columns": {"conversations": "messages"}},
        ),
        ({"field_tools": "functions"}, {"columns": {"tools": "functions"}}),
        ({"type": "alpaca"}, {"format": "alpaca"}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
        (
            {"type": {"field_instruction": "q", "field_output": "a", "format": "{q}"}},
            {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}},
        ),
        ({"split": "test"}, {"split": "test"}),
        ({"shards": 4}, {"weight": 0.25}),
        ({"path": "json", "data_files": ["one.jsonl"]}, {"path": "one.jsonl"}),
    ],
)
def test_a_dataset_is_mapped(changes: dict[str, Any], source: dict[str, Any]) -> None:
    found = dataset(**changes)
    (given,) = at(found, "data")
    assert {key: given[key] for key in source} == source
    assert {one.fate.value for one in found.verdicts if one.key.startswith("datasets")} <= {"mapped", "not needed"}


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"field_thinking": "cot"}, "field_thinking", "rename the key `cot`"),
        ({"message_property_mappings": {"role": "who"}}, "message_property_mappings.role", "rename the key `who`"),
        ({"roles": {"assistant": ["bot"]}}, "roles.assistant", "rename the role bot"),
        ({"roles_to_train": ["user"]}, "roles_to_train", "only what the model says"),
        ({"message_field_training": "learn"}, "message_field_training", "to `train`"),
        ({"train_on_eos": "none"}, "train_on_eos", "always trained"),
        ({"type": "input_output"}, "type", "tokens"),
        ({"split": "train[:10%]"}, "split", "a part of a split"),
        ({"chat_template": "chatml"}, "chat_template", "Harmony"),
        ({"revision": "abc"}, "revision", "download"),
    ],
)
def test_what_the_data_has_to_change_is_said(changes: dict[str, Any], key: str, says: str) -> None:
    fate, words = verdict(dataset(**changes), f"datasets.0.{key}")
    assert fate == "not supported"
    assert says in words


def test_several_files_become_several_sources_and_test_sets_the_held_out_rows() -> None:
    files = {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca"}
    found = imported(datasets=[files, {"path": "c.jsonl", "type": "chat_template"}], test_datasets=[files])
    assert [one["path"] for one in at(found, "data")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [one["format"] for one in at(found, "data")] == ["alpaca", "alpaca", "messages"]
    assert [one["path"] for one in at(found, "eval.data")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({"saves_per_epoch": 1}, 0),
        ({"saves_per_epoch": 4, "max_steps": 100}, 25),
        ({"save_steps": 0.1, "max_steps": 100}, 10),
        ({"save_strategy": "epoch", "num_epochs": 1}, 0),
    ],
)
def test_intervals_become_steps_where_their_number_is_known(changes: dict[str, Any], every: int) -> None:
    assert at(imported(**changes), "train.save_every") == every


def test_an_interval_of_unknown_epochs_is_not_guessed() -> None:
    found = imported(saves_per_epoch=2, num_epochs=3)
    assert verdict(found, "saves_per_epoch")[0] == "not supported"
    assert at(found, "train.save_every") == 100


def test_a_step_of_rewards_has_as_many_tasks_as_there_are_answers_for() -> None:
    trl = {"reward_funcs": ["rewards.exact"], "num_generations": 8, "max_completion_length": 256, "beta": 0.02}
    trl |= {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dr_grpo", "scale_rewards": False, "use_vllm": True}
    found = imported(**GRPO, trl=trl)
    assert (at(found, "method"), at(found, "reward")) == ("grpo", ["rewards:exact"])
    assert (at(found, "rl.prompts"), at(found, "rl.group"), at(found, "rl.max_new")) == (2, 8, 256)
    assert (at(found, "rl.loss"), at(found, "rl.kl"), at(found, "rl.spread")) == ("dr_grpo", 0.02, False)
    assert (at(found, "rl.clip_low"), at(found, "rl.clip_high")) == (0.2, 0.28)
    assert verdict(found, "trl.use_vllm")[0] == "not needed"


@pytest.mark.parametrize(
    ("changes", "key", "meant"),
    [
        ({"learing_rate": 1}, "learing_rate", "learning_rate"),
        ({"lora_ranks": 4}, "lora_ranks", "lora_r"),
        ({"datasets": [{"path": "x", "role_to_train": ["user"]}]}, "datasets.0.role_to_train", "roles_to_train"),
        ({**GRPO, "trl": {"num_generation": 4}}, "trl.num_generation", "num_generations"),
    ],
)
def test_a_misspelt_key_is_told_with_the_one_that_was_meant(changes: dict[str, Any], key: str, meant: str) -> None:
    fate, words = verdict(imported(**changes), key)
    assert fate == "unknown to Axolotl"
    assert f"did you mean `{meant}" in words


def outcome(given: dict[str, Any]) -> set[str]:
    """The keys that have a verdict, or none of them where the config is refused, by the line of one."""
    try:
        return {one.key.partition(".")[0] for one in import_axolotl(dump_yaml(given), "config.yaml").verdicts}
    except RecipeError as error:
        return set() if re.match(r"config\.yaml(:\d+)?: ", str(error)) else {str(error)}


@pytest.mark.parametrize("value", [None, True, -1, 0.5, "text", [], ["a"], {"a": 1}, [{"a": 1}]], ids=str)
def test_any_value_of_any_key_has_its_verdict_or_is_refused_by_line(value: Any) -> None:
    stops = ("base_model", "datasets", "rl", "reward_model", "process_reward_model")
    plain = {**BASE, **LORA}
    changed = {key: value for key in sorted(KNOWN) if key not in stops}
    for part in (changed, *({key: value} for key in sorted(KNOWN)[::9])):
        given = {**plain, **part}
        assert outcome(given) in (set(), given.keys())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base_model: [", "config.yaml:1: not valid YAML"),
        ("just words", "a mapping of keys to values"),
        ("services:\n  web: {}\nports: [80]\n", "no Axolotl config"),
        ("model: x\ndata: y\n", "already"),
        ("datasets: [{path: x}]\nlearning_rate: 1\n", "`base_model` is missing"),
        ("base_model: x\nlearning_rate: 1\n", "`datasets` is missing"),
        ("base_model: x\ndatasets: [{path: x}]\nrl: dpo\n", "config.yaml:3: `rl` is dpo"),
        ("base_model: x\ndatasets: [{path: x}]\nlearning_rate: -1\n", "config.yaml:3: `train.learning_rate` is -1.0"),
        ("base_model: x\nbase_model: y\n", "given twice"),
    ],
)
def test_what_no_recipe_can_be_made_of_is_refused_by_line(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_axolotl(text, "config.yaml")
    assert says in str(caught.value)


def test_a_model_that_is_no_gpt_oss_is_remarked(tmp_path: Path) -> None:
    assert any("no gpt-oss" in remark for remark in imported(base_model="Qwen/Qwen3-8B").remarks)
    assert not any("no gpt-oss" in remark for remark in imported().remarks)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    assert not any("no gpt-oss" in remark for remark in imported(base_model=str(tmp_path)).remarks)


def test_text_of_any_kind_survives_into_the_recipe() -> None:
    odd = 'say "no": # not a comment\n\tüber \\ yes \u2028 end'
    assert at(imported(default_system_message=odd), "data.0.developer") == odd


def test_the_command_prints_the_recipe_alone_and_overwrites_nothing(tmp_path: Path) -> None:
    file, output = tmp_path / "config.yaml", tmp_path / "mine.yaml"
    file.write_text(dump_yaml(BASE))
    done = CliRunner().invoke(app, ["import-recipe", str(file)])
    assert done.exit_code == 0
    assert "\nmodel: openai/gpt-oss-20b" in done.stdout
    assert "mapped (" in done.stderr
    assert "mapped (" not in done.stdout
    assert CliRunner().invoke(app, ["import-recipe", str(file), "--output", str(output)]).exit_code == 0
    before = output.read_text()
    assert before == done.stdout
    again = CliRunner().invoke(app, ["import-recipe", str(file), "--output", str(output), "--gpus", "2"])
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert output.read_text() == before


def test_a_config_that_is_not_there_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(BASE))
    done = CliRunner().invoke(app, ["import-recipe", str(tmp_path / "confg.yaml")])
    assert done.exit_code == 2
    assert "did you mean" in done.stderr
