"""`--push`: what arrives at the hub, the card, what never leaves this machine, and errors.

The hub is a stand-in (tests/export/hub.py): the real one isn't asked here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from ossia.cli import app
from ossia.config import Recipe
from ossia.errors import Interrupted, MissingExtraError, ServerError, UserError
from ossia.export import export_model
from ossia.export.card import Kind, Run, model_card, public_recipe
from ossia.export.push import Hub, kind_of, push_export
from ossia.model.peft import save_adapter
from tests.conftest import MakeTiny
from tests.export.conftest import arch_of, random_lora
from tests.export.hub import TOKEN, Repo, StandIn, stand_in
from tests.shapes import LEAST

BASE = "openai/gpt-oss-20b"
REPO = "me/my-model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, without Xet, which it doesn't speak, and with uploads that don't wait before they try again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with stand_in() as running:
        yield running


def opened(hub: StandIn, repo: str = REPO, *, private: bool = False, token: str = TOKEN) -> Hub:
    return Hub.open(repo, private=private, endpoint=hub.url, token=token)


def front_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tiny: MakeTiny) -> dict[str, Path]:
    """One export of each kind, of an adapter on a tiny model."""
    folder, model = tmp_path_factory.mktemp("exports"), tiny(LEAST)
    save_adapter(folder / "given", random_lora(arch_of(model)), base_model=str(model))
    paths = {}
    for to, name in (("hf-bf16", "merged"), ("peft", "adapter"), ("gguf", "m.gguf"), ("gguf-lora", "lora.gguf")):
        paths[to] = folder / name
        export_model(str(model), to=to, output=paths[to], adapter=str(folder / "given"))
    return paths


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, with folders, an address and a reward that must not be seen by others."""
    secret = tmp_path / "secret-data.jsonl"
    secret.write_text("{}\n")
    recipe = {
        "model": BASE,
        "data": [{"path": "someone/public-set"}, {"path": "someone/private-set"}, {"path": str(secret)}],
        "adapter": {"rank": 8, "targets": ["attention", "experts"], "init_from": str(tmp_path / "init")},
        "harmony": {"identity": "You are Secretive."},
        "eval": {"split": 0.1},
        "train": {"steps": 40, "learning_rate": 1e-4},
        "output": str(tmp_path / "run"),
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml(), encoding="utf-8")
    events = [
        {"event": "start", "step": 0},
        {"event": "eval", "step": 0, "eval_loss": 2.5},
        {"event": "step", "step": 1, "loss": 2.0, "tokens": 1000},
        {"event": "step", "step": 40, "loss": 0.25, "tokens": 2000},
        {"event": "eval", "step": 40, "eval_loss": 0.75},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "env.json").write_text(json.dumps({"ossia": "0.1.0", "torch": "2.13.0", "device": "NVIDIA H100"}))
    return folder


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf-bf16", "peft", "gguf", "gguf-lora"])
def test_every_byte_of_an_export_arrives_with_a_card_in_one_commit(
    hub: StandIn, exports: dict[str, Path], kind: str
) -> None:
    said: list[str] = []
    url = push_export(exports[kind], opened(hub), base=BASE, say=said.append)
    assert url == f"{hub.url}/{REPO}"
    repo, path = hub.repos[REPO], exports[kind]
    assert repo.commits == ["Written by ossia export"]
    assert not repo.private
    local = {path.name: path} if path.is_file() else {file.name: file for file in path.iterdir()}
    assert repo.files.keys() == local.keys() | {"README.md"}
    for name in local.keys() - {"adapter_config.json"}:
        assert repo.files[name] == local[name].read_bytes(), name
    front = front_of(repo.files["README.md"].decode())
    assert front["base_model"] == BASE
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == {"hf-bf16": "transformers", "peft": "peft"}.get(kind, "gguf")
    assert front["base_model_relation"] == ("adapter" if kind in ("peft", "gguf-lora") else "quantized")
    assert f"pushed {len(repo.files)} files" in said[-1]
    assert "README.md" not in [file.name for file in path.parent.rglob("*")]


def test_with_xet_the_same_files_arrive_and_a_refusal_is_told(
    hub: StandIn, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail["GET", "/xet-write-token/"] = [403, 1000]
    with pytest.raises(ServerError, match="once more: ossia push"):
        push_export(exports["hf-bf16"], opened(hub), base=BASE)
    assert hub.repos[REPO].files == {}
    hub.fail.clear()
    push_export(exports["hf-bf16"], opened(hub), base=BASE)
    large = [file for file in exports["hf-bf16"].iterdir() if file.suffix == ".safetensors"]
    for file in large:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert hub.repos[REPO].files[file.name] == f"sha256:{digest}".encode()
    assert hub.uploads == []
    assert hub.xet_bytes > sum(file.stat().st_size for file in large) / 2


def test_an_adapter_names_its_base_as_the_hub_does_and_is_left_as_it_is_here(
    hub: StandIn, exports: dict[str, Path], tmp_path: Path
) -> None:
    config = exports["peft"] / "adapter_config.json"
    before = config.read_bytes()
    with pytest.raises(
        UserError, match=r"is a folder of this machine(.|\n)*ossia push .*adapter me/my-model --base open"
    ):
        push_export(exports["peft"], opened(hub))
    assert hub.repos == {}
    push_export(exports["peft"], opened(hub), base=BASE)
    sent = json.loads(hub.repos[REPO].files["adapter_config.json"])
    assert sent == {**json.loads(before), "base_model_name_or_path": BASE}
    assert config.read_bytes() == before
    found = tmp_path / "x.safetensors"
    found.write_bytes(hub.repos[REPO].files["adapter_model.safetensors"])
    assert load_file(found).keys() == load_file(exports["peft"] / "adapter_model.safetensors").keys()


def test_the_card_tells_how_a_run_was_trained(hub: StandIn, exports: dict[str, Path], run: Path) -> None:
    hub.datasets = {"someone/public-set": False, "someone/private-set": True}
    push_export(exports["peft"], opened(hub), run=run)
    card = hub.repos[REPO].files["README.md"].decode()
    front = front_of(card)
    assert front["datasets"] == ["someone/public-set"]
    assert front["base_model"] == BASE
    assert "sft" in front["tags"]
    for fact in (
        "| steps | 40 |",
        "| tokens | 3,000 |",
        "| held-out loss | 2.5 at step 0, 0.75 at step 40 |",
        "| data | someone/public-set, 2 that are not public |",
        "| device | NVIDIA H100 |",
        "| versions | ossia 0.1.0, torch 2.13.0 |",
        "  learning_rate: 0.0001\n",
        f'PeftModel.from_pretrained(model, "{REPO}")',
        f"ossia chat {BASE} --adapter my-model",
    ):
        assert fact in card, fact


@pytest.mark.parametrize("kind", ["hf-bf16", "hf-mxfp4", "peft", "gguf", "gguf-lora"])
def test_every_card_says_how_to_load_what_is_there(kind: Kind) -> None:
    card = model_card(kind, REPO, file="m.gguf" if "gguf" in kind else None, base=None, datasets=[], run=None)
    assert "base_model" not in front_of(card)
    assert "license" not in front_of(card)
    commands = {"hf-bf16": "vllm serve me/", "hf-mxfp4": "vllm serve me/", "peft": "PeftModel"}
    assert commands.get(kind, "llama-server -m m.gguf" if kind == "gguf" else "--lora m.gguf") in card


def test_it_can_be_private_and_a_public_one_cant_be_made_so(hub: StandIn, exports: dict[str, Path]) -> None:
    push_export(exports["gguf-lora"], opened(hub, private=True), base=BASE)
    assert hub.repos[REPO].private
    hub.repos["me/public"] = Repo()
    with pytest.raises(UserError, match="me/public is there already and public"):
        opened(hub, "me/public", private=True)


def test_a_second_push_is_a_commit_on_top_and_sends_nothing_twice(hub: StandIn, exports: dict[str, Path]) -> None:
    hub.repos[REPO] = Repo(files={"other.txt": b"theirs"})
    for _ in range(2):
        push_export(exports["hf-bf16"], opened(hub), base=BASE)
    assert hub.repos[REPO].files["other.txt"] == b"theirs"
    assert len(hub.uploads) == len(set(hub.uploads))


def test_a_card_that_somebody_else_wrote_stays_and_ours_is_renewed(hub: StandIn, exports: dict[str, Path]) -> None:
    said: list[str] = []
    push_export(exports["gguf-lora"], opened(hub), base=BASE)
    first = hub.repos[REPO].files["README.md"]
    push_export(exports["gguf-lora"], opened(hub), base="openai/gpt-oss-120b")
    assert hub.repos[REPO].files["README.md"] != first
    hub.repos[REPO].files["README.md"] = b"# Mine\n"
    push_export(exports["gguf-lora"], opened(hub), base=BASE, say=said.append)
    assert hub.repos[REPO].files["README.md"] == b"# Mine\n"
    assert "has a README.md that Ossia didn't write" in said[0]


# --- what stays here --------------------------------------------------------------------------------------------------


def test_nothing_of_the_machine_or_the_data_gets_into_a_card(
    hub: StandIn, exports: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    push_export(exports["peft"], opened(hub), run=run)
    everything = b"\n".join(hub.repos[REPO].files.values()).decode(errors="replace")
    for private in (str(tmp_path), str(Path.home()), "secret-data", "private-set", "Secretive", TOKEN, "init"):
        assert private not in everything.replace("init_lora_weights", "").replace("initial", ""), private


def test_a_recipe_shows_numbers_and_plain_words_only() -> None:
    recipe = Recipe.model_validate(
        {
            "method": "grpo",
            "model": "/data/models/x",
            "reward": "/srv/mine/rewards.py:score",
            "data": {"path": "/srv/mine/prompts.jsonl"},
            "adapter": {"targets": {"q_proj": {"rank": 4}}},
            "rl": {"rollout": "http://10.0.0.1:8000/v1"},
            "log": {"sinks": ["wandb"]},
            "train": {"steps": 3},
        }
    )
    shown = yaml.safe_dump(public_recipe(recipe))
    assert "q_proj" in shown
    assert "loss: dapo" in shown
    for private in ("/", "10.0.0.1", "srv", "score", "wandb", "runs"):
        assert private not in shown, private


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "notes.txt"])
@pytest.mark.parametrize("text", ["folder", "token"])
def test_a_text_that_names_a_folder_of_this_machine_or_a_token_is_not_pushed(
    hub: StandIn, exports: dict[str, Path], tmp_path: Path, name: str, text: str
) -> None:
    shutil.copytree(exports["hf-bf16"], tmp_path / "x")
    file = tmp_path / "x" / name
    leak = str(tmp_path) if text == "folder" else TOKEN
    if name == "config.json":
        file.write_text(json.dumps({**json.loads(file.read_text()), "note": leak}))
    else:
        file.write_text(f"x {leak} y")
    with pytest.raises(UserError, match=rf"{name} holds .* isn't for others") as caught:
        push_export(tmp_path / "x", opened(hub), base=BASE)
    assert TOKEN not in str(caught.value)
    assert hub.repos == {}


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_wrong_token_a_strange_owner_and_a_name_that_is_none_are_told_before_anything_is_sent(
    hub: StandIn, exports: dict[str, Path]
) -> None:
    with pytest.raises(ServerError, match=r"who you are(.|\n)*hf auth login") as caught:
        opened(hub, token="hf_wrong")
    assert caught.value.status == 401
    for name in ("my-model", "a/b/c", "me/my model", "me/"):
        with pytest.raises(UserError, match="no name of a repository"):
            opened(hub, name)
    with pytest.raises(ServerError, match=r"may not write there(.|\n)*kept: .*merged; once more: ossia push") as caught:
        push_export(exports["hf-bf16"], opened(hub, "openai/mine"), base=BASE)
    assert caught.value.status == 403
    assert hub.uploads == []


def test_without_a_token_it_says_how_to_get_one(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ServerError, match=r"who you are(.|\n)*run `hf auth login`"):
        Hub.open(REPO, private=False, endpoint=hub.url)


def test_an_interrupted_push_says_how_to_go_on(
    hub: StandIn, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub._commit_api._upload_lfs_files", pressed)
    with pytest.raises(Interrupted, match=r"isn't sent again\n  kept: .*merged; once more: ossia push"):
        push_export(exports["hf-bf16"], opened(hub), base=BASE)
    assert hub.repos[REPO].files == {}


def test_a_hub_that_cant_be_reached_is_told() -> None:
    with stand_in() as gone:
        pass
    with pytest.raises(ServerError, match="next: try again when it can be reached"):
        opened(gone)


@pytest.mark.parametrize("broken", [("PUT", r"^/lfs/", 500), ("POST", "/commit/", 503), ("POST", "/commit/", 0)])
def test_a_push_that_broke_off_leaves_no_half_model_and_goes_on_where_it_was(
    hub: StandIn, exports: dict[str, Path], broken: tuple[str, str, int]
) -> None:
    method, pattern, status = broken
    path = exports["hf-bf16"]
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    hub.fail[method, pattern] = [status, 1000]
    with pytest.raises(
        ServerError, match=r"isn't sent again\n  kept: .*\n?.*once more: ossia push .*merged me/my-model"
    ):
        push_export(path, opened(hub), base=BASE)
    assert hub.repos[REPO].files == {}
    hub.fail.clear()
    sent = len(hub.uploads)
    push_export(path, opened(hub), base=BASE)
    assert hub.repos[REPO].files.keys() == before.keys() | {"README.md"}
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    if "commit" in pattern:
        assert len(hub.uploads) == sent, "all of it was there already"


def test_what_is_no_export_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.gguf").write_text("not one")
    for path, message in (
        (tmp_path, "is no export"),
        (tmp_path / "notes.txt", "is no export"),
        (tmp_path / "nowhere", "isn't there"),
        (tmp_path / "x.gguf", "no whole GGUF file"),
    ):
        with pytest.raises(UserError, match=message):
            kind_of(path)
    with pytest.raises(UserError, match=r"no recipe.yaml in it"):
        Run.open(tmp_path)
    monkeypatch.setattr("ossia.export.push.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ossia\[hub\]'"):
        Hub.open(REPO, private=False)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_export_and_push_in_one_command_ask_the_hub_before_they_write(
    hub: StandIn, tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    model, output = tiny(LEAST), tmp_path / "out"

    def command(*words: str) -> Result:
        return CliRunner().invoke(app, words)

    given = ("export", str(model), "--to", "hf-bf16", "--output", str(output))
    done = command(*given, "--push", REPO)
    assert done.exit_code == 2
    assert "hf auth login" in done.stderr
    assert not output.exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = command(*given, "--push", REPO, "--private")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [str(output), f"{hub.url}/{REPO}"]
    assert hub.repos[REPO].private
    assert hub.repos[REPO].files.keys() == {file.name for file in output.iterdir()} | {"README.md"}
    assert command("push", str(output), "me/again", "--base", BASE).exit_code == 0
    assert front_of(hub.repos["me/again"].files["README.md"].decode())["base_model"] == BASE
    done = command(*given, "--private")
    assert done.exit_code == 2
    assert "--private is for --push" in done.stderr
