"""The `ossia` command: quick to answer, exact exit codes, results on stdout and everything else on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ossia
from ossia import cli
from ossia.errors import Interrupted, RecipeError, RunError

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo",
    "train",
    "plan",
    "data",
    "eval",
    "chat",
    "generate",
    "score",
    "serve",
    "export",
    "push",
    "tiny",
    "explain",
    "doctor",
    "attack",
    "import-recipe",
    "merge-shards",
)


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, found wherever it is started."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ossia.cli import main; main()"
    return subprocess.run([sys.executable, "-c", start, *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_names_every_command_on_stdout() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_arguments(name: str) -> None:
    body = typer.main.get_command(cli.app).commands[name]
    assert body.help
    silent = [param.name for param in body.params if not vars(param).get("help") and param.name != "help"]
    assert silent == []


def test_a_bad_recipe_is_a_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: {path: a}\ntrain: {lerning_rate: 1e-4}\n")
    done = run("train", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    places = [line.partition(": ")[0] for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert places == ["r.yaml:1", "r.yaml:2", "r.yaml:3"]  # no such model, no such file, and the key
    assert "r.yaml:3: unknown key `train.lerning_rate`; did you mean `learning_rate`?\n  allowed here" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_there_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: nowhere\ndata: {path: train.jsonl}\n")
    begin = time.perf_counter()
    done = run("train", "r.yaml", "train.steps=3", cwd=tmp_path)
    assert done.returncode == 2
    assert [line.split(": ")[0] for line in done.stderr.splitlines() if line.startswith("r.yaml")] == [
        "r.yaml:1",
        "r.yaml:2",
    ]
    assert time.perf_counter() - begin < 5


def test_a_command_or_option_that_does_not_exist_is_exit_code_2() -> None:
    for arguments in (("trian",), ("train",), ("train", "r.yaml", "--resme"), ("tiny", "x", "--weights", "int4")):
        done = run(*arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), arguments


def test_restarts_that_nothing_would_make_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {tmp_path}\ndata: {tmp_path / 'r.jsonl'}\noutput: {tmp_path / 'run'}\n")
    for name in ("r.jsonl", "config.json"):
        (tmp_path / name).write_text("{}\n")
    command = ["train", str(recipe), "--max-restarts", "2"]
    done = CliRunner().invoke(cli.app, [*command, "--nproc", "1"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--max-restarts: 2, but this run is one process, which no launcher starts" in done.stderr
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    done = CliRunner().invoke(cli.app, command, env=launched)
    assert done.exit_code == 2
    assert "--max-restarts: a launcher has started this process already; give it there" in done.stderr


def test_a_shape_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path) -> None:
    done = run("tiny", "x", "--shape", "30b", cwd=tmp_path)
    assert done.returncode == 2
    assert "allowed: demo, B1, B2, 20b, 120b" in done.stderr


def test_tiny_takes_every_size_of_a_model_from_its_options(small_tokenizer: Path, tmp_path: Path) -> None:
    sizes = {"layers": 3, "hidden": 96, "width": 64, "experts": 6, "top-k": 2, "heads": 6, "kv-heads": 3, "window": 9}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = ["tiny", str(tmp_path / "x"), "--tokenizer", str(small_tokenizer), *options, "--vocab"]
    done = CliRunner().invoke(cli.app, [*command, "640"])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'x'}\n")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")
    keys += ("num_attention_heads", "num_key_value_heads", "sliding_window", "vocab_size")
    assert [config[key] for key in keys] == [*sizes.values(), 640]
    done = CliRunner().invoke(cli.app, ["tiny", str(tmp_path / "y"), *command[2:], "64"])
    assert done.exit_code == 2
    assert "a vocabulary of 64 rows is too small for the" in done.stderr


def test_explain_prints_to_stdout_and_a_wrong_key_to_stderr() -> None:
    assert run("explain", "train.learning_rate").stdout.startswith("train.learning_rate\n  Highest learning rate")
    done = run("explain", "lerning_rate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean `train.learning_rate`?" in done.stderr


def test_doctor_says_what_the_machine_has() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ossia"] == ossia.__version__
    assert 0 < found["memory_free_bytes"] <= found["memory_bytes"]
    assert found["packages"]["torch"] == found["torch"]
    words = run("doctor").stdout
    assert "memory" in words
    assert found["packages"]["numpy"] in words
    kernels = {"c": "passes fused in C on the CPU", "torch": "passes of torch, slower, on the CPU"}
    assert kernels[found["kernels"]["cpu"]] in words
    attention = found["attention"]["cpu"]
    assert (attention["backend"], attention["problem"]) == ("cpu", "")
    assert "cpu on the CPU, tried: documents apart, outputs and gradients within 0.0" in words


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"ossia {ossia.__version__}\n"
    assert f'version = "{ossia.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RunError("disk is full"), 2, "disk is full"),
        (Interrupted("saved; go on with --resume"), 130, "saved; go on with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_ends_with_its_own_exit_code_and_no_traceback(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        cli.reporting(fail)()
    assert left.value.code == code
    assert words in capsys.readouterr().err


def test_our_own_fault_is_a_traceback_with_how_to_report_it() -> None:
    code = "import sys; from ossia import cli, config; config.explain = lambda key: 1 / 0; "
    code += "sys.argv[1:] = ['explain']; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "This is a fault of Ossia" in done.stderr


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="it has __version__, load, train"):
        ossia.lod  # noqa: B018


HALF_IMPORTED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:  # as C extensions do
                raise AttributeError("half imported")
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("words", [["doctor"], ["chat", "nowhere"], ["score", "m", "--in", "x", "--out", "y"]])
def test_ctrl_c_while_libraries_are_imported_is_one_line(words: list[str]) -> None:
    code = f"{HALF_IMPORTED}\nsys.argv[1:] = {words!r}\nfrom ossia.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_a_signal_that_was_ignored_stays_so() -> None:
    code = f"{HALF_IMPORTED.replace('sleep(5)', 'sleep(0)')}\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
    code += "\nsys.argv[1:] = ['doctor']\nfrom ossia.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [5, None, ["a"]])
def test_what_is_no_recipe_at_all_is_told(given: object) -> None:
    with pytest.raises(RecipeError, match=r"ossia.train takes a recipe's file, its keys as a dict, or a Recipe; found"):
        ossia.train(given)
