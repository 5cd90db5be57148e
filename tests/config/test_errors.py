"""Every mistake in a recipe is told at once: file and line, what was meant, what is allowed, where to read on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ossia.config import load_recipe, recipe_from_dict
from ossia.errors import RecipeError

BAD = """\
model: openai/gpt-oss-20b
dtype: bf16
adapter:
  rank: 0
  targets: [atention, experts]
lora_rank: 8
data:
  - path: train.jsonl
    train: {turns: al}
  - path: 3
    formt: x
max_length: "4096"
eval: {split: 0.1, data: {path: q}, every: 2}
train: {steps: 10, epochs: 2.0,
  warmup: 1.5, lr: 1e-4}
log: {sinks: tensorboard}
log: {}
"""


def errors_of(folder: Path, text: str, *overrides: str) -> list[str]:
    """The findings about a recipe with this text, each on one line, without the folder's name."""
    file = folder / "my.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "").replace("\n  ", " / ").splitlines()


def test_all_mistakes_of_a_file_are_told_at_once_in_its_order_with_their_lines(tmp_path: Path) -> None:
    found = errors_of(tmp_path, BAD)
    lines = [int(re.match(r"my\.yaml:(\d+): ", line).group(1)) for line in found]  # type: ignore[union-attr]
    assert lines == [2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 15, 16, 17]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (2, "`dtype` is the text 'bf16'; did you mean `bfloat16`? / allowed: bfloat16, float32, float16"),
        (4, "`adapter.rank` is 0 / expected: whole number, at least 1"),
        (
            5,
            "`adapter.targets.0` is the text 'atention'; did you mean `attention`? / allowed: attention, exp",
        ),
        (6, "unknown key `lora_rank`; did you mean `adapter.rank`? / allowed here: method, model"),
        (9, "`data.0.train.turns` is the text 'al'; did you mean `all`? / allowed: all, last"),
        (10, "`data.1.path` is 3 / expected: text        more: ossia explain data.path"),
        (11, "unknown key `data.1.formt`; did you mean `format`? / allowed here: path, format"),
        (12, "`max_length` is the text '4096'; write it without quotes / expected: whole number, at least 2"),
        (13, "`eval.split` and `eval.data` are both given; keep one"),
        (14, "`train.steps` and `train.epochs` are both given; keep one"),
        (15, "`train.warmup` is 1.5; below 1 it is a share of all steps"),
        (15, "unknown key `train.lr`; did you mean `learning_rate`? / allowed here: steps, epochs"),
        (
            16,
            "`log.sinks` is the text 'tensorboard'; write [tensorboard] / expected: list of tensorboard",
        ),
        (17, "key `log` is given twice, first in line 16; keep one"),
    ],
)
def test_a_finding_names_line_key_nearest_and_allowed(tmp_path: Path, line: int, words: str) -> None:
    assert any(found.startswith(f"my.yaml:{line}: {words}") for found in errors_of(tmp_path, BAD)), words


def with_train(text: str) -> str:
    return f"model: m\ndata: {{path: a}}\ntrain:\n  {text}\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (with_train("steps: 10\n  epochs: 1.0"), 5, "`train.steps` and `train.epochs` are both given; keep one"),
        (with_train("steps: null\n  epochs: null"), 4, "`train.steps` and `train.epochs` are both null; give one"),
        (with_train("warmup: 1.5"), 4, "`train.warmup` is 1.5; below 1 it is a share of all steps"),
        (
            with_train("steps: 10\n  warmup: 10"),
            5,
            "`train.warmup` is 10 steps, which leaves none of `train.steps`, 10",
        ),
        (with_train("tokens_per_step: 64"), 4, "`train.tokens_per_step` is 64, below `max_length`, 4096"),
        (with_train("tokens_per_pack: 64"), 4, "`train.tokens_per_pack` is 64; it has to be from `max_length`, 4096"),
        (with_train("learning_rate: .inf"), 4, "`train.learning_rate` is inf"),
        (with_train("steps: 1e3"), 4, "`train.steps` is 1000.0; write 1000"),
        (with_train("steps: [1"), 5, "not valid YAML"),
        (with_train("steps: !!str 5"), 4, "tag `tag:yaml.org,2002:str` is not used in recipes"),
        ("model: m\n", 1, "`data` is missing: the rows to train on"),
        ("data: {path: a}\n", 1, "`model` is missing: Folder of a gpt-oss checkpoint"),
        ("model: m\ndata: []\n", 2, "`data` is an empty list"),
        ("model: m\ndata: [3]\n", 2, "`data.0` is 3 / expected: a section with path, format"),
        ("model: m\ndata: {path: a}\nweights: mmap\n", 3, "`weights` is mmap, which only reads"),
        (
            "model: m\ndata: {path: a}\nadapter: {}\nweights: mmap\nparallel: {shard: all}\n",
            5,
            "`parallel.shard` is all, which cuts weights, and `weights: mmap` goes with whole ones; leave one of them",
        ),
        (
            "model: m\ndata: {path: a}\nparallel: {shard: none, offload: true}\n",
            3,
            "`parallel.offload` is of parts of cut weights, and `parallel.shard` is none; leave one of them out",
        ),
        (
            "model: m\ndata: {path: a}\nqat: mxfp4\nparallel: {shard: all}\n",
            4,
            "`parallel.shard` is all, which cuts weights, and `qat: mxfp4` goes with whole ones; leave one of them",
        ),
        (
            "model: m\nenv: sort\nmethod: grpo\ntrain: {steps: 1}\nadapter: {}\nparallel: {shard: all}\n",
            6,
            "`parallel.shard` is for `method: sft`; `grpo` is one process as yet",
        ),
        (
            "model: m\ndata: {path: a}\nadapter: {}\nqat: nvfp4\n",
            4,
            "`qat` is the text 'nvfp4'; did you mean `mxfp4`? / allowed: mxfp4",
        ),
        (
            "model: m\ndata: {path: a}\nadapter: {targets: [attention]}\nqat: mxfp4\n",
            4,
            "`qat` is mxfp4, which rounds trained experts, but `adapter.targets` has none of them; add `experts`",
        ),
        (
            "model: m\ndata: {path: a}\nadapter: {targets: [down_proj], dropout: 0.1}\nqat: mxfp4\n",
            3,
            "`adapter.dropout` zeroes inputs of adapters, but `qat` merges those of experts; set it to 0",
        ),
        (
            "model: m\nenv: sort\nmethod: grpo\nmax_length: 2048\ntrain: {steps: 1}\nadapter: {}\nqat: mxfp4\n"
            "rl: {rollout: 'http://localhost:1/v1'}\n",
            8,
            "`rl.rollout` is a server, which samples with an unrounded adapter, not with what `qat` trains",
        ),
        ("method: dpo\nmodel: m\ndata: {path: a}\n", 1, "`method` is the text 'dpo', which Ossia cannot do yet"),
        ("model: m\ndata: {path: a}\neval:\n  every: 5\n", 4, "`eval.every` needs held-out rows"),
        ("model: m\ndata: {path: a}\nadapter: {rslora: yes}\n", 3, "`adapter.rslora` is the text 'yes'; write true"),
        ("model: m\ndata: {path: a}\nadapter:\n  targets:\n    experst: {}\n", 5, "`adapter.targets` has no `experst`"),
        ("model: m\ndata: {path: a}\nadapter: {targets: []}\n", 3, "`adapter.targets` is an empty list"),
        (
            "model: m\ndata: {path: a}\nx: &x {rank: 1}\nadapter:\n  <<: *x\n",
            5,
            "`<<` merges keys, which Ossia does not",
        ),
        (
            with_train("threads: 100000"),
            4,
            "`train.threads` is 100000 / expected: whole number, at least 1, at most 1024",
        ),
        (
            with_train("seed: 18446744073709551616"),
            4,
            "expected: whole number, at least 0, at most 9223372036854775807",
        ),
        (with_train(f"steps: {'9' * 5000}"), 4, "a number of 5,000 digits"),
        (with_train("steps: 1__0"), 4, "`train.steps` is the text '1__0' / expected"),
        (with_train("steps: 1_"), 4, "`train.steps` is the text '1_' / expected"),
        (with_train("learning_rate: '1e-5'"), 4, "`train.learning_rate` is the text '1e-5'; write it without quotes"),
        (f"model: m\ndata: {'[' * 2000}", 2, "nested deeper than 50 levels"),
        (f"model: m\ndata:\n  {'{a: ' * 3000}", 3, "nested deeper than 50 levels"),
        ("model: m\ndata:\n  path: a\x00b\n", 3, "not valid YAML: special characters are not allowed"),
        (
            "model: m\ndata: a\nadapter:\n  targets:\n    attention: 8\n",
            5,
            "is 8 / expected: a section with rank, alpha",
        ),
        (
            "model: m\ndata: a\nadapter: {targets: [router, experts, router]}\n",
            3,
            "`adapter.targets` names router twice",
        ),
        ("model: m\ndata: a\nharmony: {current_date: yesterday}\n", 3, "is yesterday; write a day as YYYY-MM-DD"),
        ("model: m\ndata: a\nharmony: {current_date: 2024-13-01}\n", 3, "is 2024-13-01; write a day as YYYY-MM-DD"),
        ("model: m\ndata: a\noutput: ''\n", 3, "`output` is empty"),
        ("model: m\ndata: {path: a}\n? [a]\n: 1\n", 3, "a key must be plain text"),
    ],
)
def test_each_kind_of_mistake_is_told_in_words(tmp_path: Path, text: str, line: int, words: str) -> None:
    found = errors_of(tmp_path, text)
    assert any(entry.startswith(f"my.yaml:{line}: ") and words in entry for entry in found), found


def test_mutual_mistakes_of_one_section_are_told_together(tmp_path: Path) -> None:
    found = errors_of(tmp_path, with_train("steps: 10\n  epochs: 1.0\n  warmup: 20"))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1", "unknown key `train.lerning_rate`; did you mean `learning_rate`?"),
        ("trian.steps=1", "unknown key `trian`; did you mean `train`?"),
        ("train.steps=x", "`train.steps` is the text 'x'"),
        ("train.steps=", "`train.steps` and `train.epochs` are both null"),
        ("train", "an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("data.7.path=x", "`data` is a list of 1; its entries are numbered from 0: data.0.path"),
        ("data.path=x", "`data` is a list of 1; its entries are numbered from 0: data.0.path"),
        ("data.0.pth=x", "unknown key `data.0.pth`; did you mean `path`?"),
        ("model.x=1", "`model` is 'm', which has no keys inside it"),
        ("train.seed=[1", "the value of `train.seed` is not valid YAML"),
        ("log.sinks.0=wandb", "`log.sinks` is a list, which is set as a whole: log.sinks=[wandb]"),
        ("adapter.targets.0=router", "`adapter.targets` is a list, which is set as a whole: adapter.targets=[router]"),
    ],
)
def test_a_wrong_override_is_named_by_itself(tmp_path: Path, override: str, words: str) -> None:
    extra = ["train.epochs=null"] if override == "train.steps=" else []
    found = errors_of(tmp_path, "model: m\ndata:\n  - path: a\n", override, *extra)
    assert found[0].startswith(f"command line, {override}: {words}"), found


def test_a_key_that_two_overrides_set_is_an_error(tmp_path: Path) -> None:
    found = errors_of(tmp_path, "model: m\ndata: {path: a}\n", "train.steps=3", "train.steps=4")
    assert found == ["command line, train.steps=4: `train.steps` is set twice, also by train.steps=3; keep one"]


def test_a_key_inside_what_another_override_set_is_an_error_only_if_that_set_it(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("model: m\ndata: a\n")
    with pytest.raises(RecipeError, match=r"`adapter\.rank` is set twice, also by adapter=\{rank: 4\}; keep one"):
        load_recipe(file, ["adapter={rank: 4}", "adapter.rank=5"])
    adapter = load_recipe(file, ["adapter={alpha: 4}", "adapter.rank=5", "adapter.dropout=0.5"]).adapter
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (5, 4.0, 0.5)


def test_what_an_override_replaced_is_not_looked_for_in_the_file(tmp_path: Path) -> None:
    found = errors_of(tmp_path, "model: m\ndata:\n  - path: a\n", "data=[{path: 3}]")
    assert found[0].startswith("command line, data=[{path: 3}]: `data.0.path` is 3")


def test_an_override_can_mend_what_the_file_has_wrong(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("model: m\ndata: {path: a}\ndtype: bf16\n")
    assert load_recipe(file, ["dtype=float32"]).dtype == "float32"


def test_a_recipe_that_is_not_there_names_the_nearest_that_is(tmp_path: Path) -> None:
    (tmp_path / "sft-20b.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"sft20b\.yaml: no such recipe; did you mean .*sft-20b\.yaml\?"):
        load_recipe(tmp_path / "sft20b.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_mistake_in_python_values_is_told_the_same_way() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: unknown key `train\.lr`; did you mean `learning_rate`\?"):
        recipe_from_dict({"model": "m", "data": {"path": "a"}, "train": {"lr": 1e-4}})
