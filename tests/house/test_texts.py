"""What is written for readers is true: README commands, recipes, and nothing about the machine it was written on."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from ossia.cli import app
from ossia.config import check_recipe, is_hub_name, read_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PLANNED = sorted((ROOT / "docs" / "scale").glob("*.yaml"))  # for machines that weren't at hand
NOT_OURS = (".git", ".venv", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__", "runs", "build", "dist")
SUFFIXES = (
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".json",
    ".cfg",
    ".sh",
    ".jinja",
    ".html",
    "Makefile",
    "run",
)
_PIECES = ("/wo rk/", "/ro ot/", "/ho me/", "/op t/pypi", "pypi .org", "pythonhosted .org", "registry .npmjs")
FORBIDDEN = tuple(piece.replace(" ", "") for piece in _PIECES)  # in pieces, so that this file doesn't name them
MODELS = sorted(set(re.findall(r"openai/gpt-oss-[\w-]+", README)))
ROW = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "thinking": "Two.", "content": "2"}]}


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a Markdown text in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Every command in the bash blocks, as arguments; comments and continued lines are understood."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [parts for line in lines if (parts := shlex.split(line, comments=True))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it, and current: the README's YAML files, the recipes, a model's folder, some rows."""
    for text in blocks(README, "yaml"):
        name = re.match(r"#\s*(\S+\.yaml)", text)
        assert name, f"a yaml block of the README begins with the name of its file, `# my.yaml`:\n{text}"
        (tmp_path / name.group(1)).write_text(text, encoding="utf-8")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for data in {*re.findall(r"[\w./-]+\.jsonl", README)}:
        (tmp_path / data).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / data).write_text((json.dumps(ROW) + "\n") * 40)
    for model in MODELS:
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text('{"max_position_embeddings": 131072}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_the_readme_needs_two_commands_and_they_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    used = [line[1] for line in commands(README) if line[0] == "make"]
    assert {"demo", "test"} <= set(used)
    for target in used:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_ossia_command_of_the_readme_is_one_with_files_that_fit(place: Path) -> None:
    group = typer.main.get_command(app)
    for parts in (line for line in commands(README) if line[0] == "ossia"):
        with group.make_context("ossia", parts[1:], resilient_parsing=True) as context:
            name, body, arguments = group.resolve_command(context, parts[1:])
        if name in ("explain", "doctor"):
            subprocess.run([sys.executable, "-m", *parts], check=True, capture_output=True)
        with body.make_context(name, list(arguments)) as parsed:
            if "recipe" in parsed.params:
                recipe, places = read_recipe(parsed.params["recipe"], parsed.params["overrides"] or ())
                check_recipe(recipe, places)


@pytest.mark.slow
def test_every_python_example_of_the_readme_runs(place: Path) -> None:
    sizes = ["--hidden", "64", "--layers", "2", "--experts", "4", "--width", "64", "--heads", "2", "--kv-heads", "1"]
    for model in MODELS if blocks(README, "python") else ():
        (place / model / "config.json").unlink()
        (place / model).rmdir()
        subprocess.run([sys.executable, "-m", "ossia", "tiny", model, *sizes], check=True)
    for code in blocks(README, "python"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


@pytest.mark.slow
def test_the_readmes_own_reward_trains_a_model(place: Path) -> None:
    (code,) = [text for text in blocks(README, "python") if text.startswith("# my_rewards.py")]
    assert len(code.splitlines()) <= 10
    (place / "my_rewards.py").write_text(code)
    rows = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in range(40)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--hidden", "64", "--layers", "2", "--experts", "4", "--width", "64", "--heads", "2", "--kv-heads", "1"]
    subprocess.run([sys.executable, "-m", "ossia", "tiny", "tiny", *sizes], check=True)
    smaller = "model=tiny device=cpu dtype=float32 rl.prompts=2 rl.group=2 rl.max_new=8 rl.eval_tasks=0 train.steps=1"
    command = [
        sys.executable,
        "-m",
        "ossia",
        "train",
        "my-rewards.yaml",
        *smaller.split(),
        "train.tokens_per_step=4096",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (place / "runs/my-rewards/events.jsonl").read_text().splitlines()]
    (step,) = [event for event in steps if event["event"] == "step"]
    assert step["part_exact"] == 0.0
    assert step.get("reward_failures", 0) == 0


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_loads_and_fits(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, places = read_recipe(file)
    for source in (*(recipe.data or ()), *(recipe.eval.data or ())):
        if not is_hub_name(source.path):
            Path(source.path).parent.mkdir(parents=True, exist_ok=True)
            Path(source.path).write_text(json.dumps(ROW) + "\n")
    folder = tmp_path / "the-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 131072}')
    check_recipe(recipe, places, model_folder=folder)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_says_by_which_run_its_figures_were_measured(file: Path) -> None:
    head = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("command", "peak", "tokens/s", "score", "device", "date", "commit"):
        assert re.search(rf"^#\s*{word}\b", head, flags=re.MULTILINE), f"the header lacks `# {word}: ...`"
    (command,) = re.findall(r"^# command\s+(.*)", head, flags=re.MULTILINE)
    assert command.startswith(f"ossia train recipes/{file.name}"), "its command trains another recipe"
    read_recipe(file, shlex.split(command)[3:])


def test_the_recipe_of_the_demo_is_the_one_that_the_demo_writes() -> None:
    from ossia.demo.prepare import Plan, recipe_text

    head, _, rest = (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8").partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert rest == recipe_text(Path("runs/demo"), seed=0, plan=Plan())


def our_files() -> Iterator[Path]:
    """Every text file of the repository, whether committed yet or not."""
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in NOT_OURS]
        yield from (Path(folder, name) for name in names if name.endswith(SUFFIXES))


def test_nothing_names_the_machine_or_the_registry_it_was_written_with() -> None:
    named = [
        f"{file.relative_to(ROOT)}: {word}"
        for file in our_files()
        for word in FORBIDDEN
        if word in file.read_text(encoding="utf-8", errors="replace")
    ]
    assert named == []


def test_ci_runs_the_readmes_test_command_and_ends_with_its_status() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^exit .*test_status", script, flags=re.MULTILINE)


def test_the_pins_hold_every_package_that_the_project_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = project["optional-dependencies"]
    used = ("hub", "data", "demo", "grammar", "serve", "dev")
    asked = [*project["dependencies"], *(name for extra in used for name in extras[extra])]
    names = {re.split(r"[<>=!\[ ]", name)[0].lower() for name in asked} - {"ossia"}
    assert names - pinned == set()
    assert "+" not in "".join(pinned)


def test_the_benchmark_tables_are_the_ones_the_results_make() -> None:
    from benchmarks import table

    assert table.PAGE.read_text(encoding="utf-8") == table.page()
    assert table.readme(README) == README
    exports = table.exports.PAGE.read_text(encoding="utf-8")
    assert table.exports.page(exports) == exports


def test_what_is_planned_for_many_gpus_is_what_the_code_says_today() -> None:
    from benchmarks import scale

    assert scale.page(text := scale.PAGE.read_text(encoding="utf-8")) == text
    for file in PLANNED:
        text = file.read_text(encoding="utf-8")
        assert scale.planned_recipe(text) == text, f"{file}: python -m benchmarks.scale writes it again"


@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.name)
def test_every_planned_recipe_loads_and_says_that_it_is_planned_and_what_was_measured(file: Path) -> None:
    recipe, _ = read_recipe(file)
    assert recipe.output == Path("runs") / file.stem
    head = file.read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("planned", "start", "plan", "measured"):
        assert re.search(rf"^# {word} +\S", head, flags=re.MULTILINE), f"the header lacks `# {word} ...`"
    (start,) = re.findall(r"^# start +(.*)", head, flags=re.MULTILINE)
    assert start.endswith(f"ossia train docs/scale/{file.name}"), "its command starts another recipe"
    (plan,) = re.findall(r"^# plan +(.*)", head, flags=re.MULTILINE)
    assert f"ossia plan docs/scale/{file.name} --gpu " in plan
    gpus = re.search(r"--gpus (\d+)", plan)
    nodes, each = (re.search(rf"--{key} (\d+)", start) for key in ("nnodes", "nproc-per-node"))
    planned = int(gpus.group(1)) if gpus else 1
    said = recipe.parallel.ranks
    alone = (
        1 if not start.startswith("ossia train") else planned if said == "auto" else said
    )  # auto: the GPUs there are
    ranks = (int(nodes.group(1)) if nodes else 1) * (int(each.group(1)) if each else alone)
    assert ranks == planned, "it is planned for other GPUs than it is started on"
