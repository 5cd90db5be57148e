"""The files that start a run on a cluster, as far as they can be checked without one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ossia.cli import app

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SBATCH = FOLDER / "train.sbatch"
JOBS = sorted(FOLDER.glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def pods(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """How many pods of each kind, and what one is."""
    for found in documents(file):
        spec = found["spec"]
        if found["kind"] == "Job":
            yield spec["completions"], spec["template"]["spec"]
        elif found["kind"] == "PyTorchJob":
            yield from ((kind["replicas"], kind["template"]["spec"]) for kind in spec["pytorchReplicaSpecs"].values())


def option(command: list[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in command if word.startswith(f"--{name}=")), None)


def test_the_slurm_script_is_bash_and_asks_for_what_it_starts() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True, capture_output=True)
    text = SBATCH.read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, flags=re.MULTILINE))
    (ranks,) = re.findall(r"--nproc-per-node (\d+)", text)
    assert asked["gpus-per-node"] == ranks
    assert asked["ntasks-per-node"] == "1"
    head, _, body = text.partition("set -euo pipefail\n")
    assert "#SBATCH" not in body, "SLURM reads options above the first command alone"
    assert all(line.startswith("#") for line in head.splitlines())


def test_the_slurm_script_starts_torchrun_on_every_machine_and_resumes_what_was_requeued(tmp_path: Path) -> None:
    for name, says in (("scontrol", "echo first; echo second"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **job}

    def started(**more: str) -> list[str]:
        words = ["bash", SBATCH, "my.yaml", "train.steps=3"]
        return subprocess.run(
            words, env=environment | more, check=True, capture_output=True, text=True
        ).stdout.splitlines()

    first = started()
    assert first[-5:] == ["-m", "ossia", "train", "my.yaml", "train.steps=3"]
    assert first[first.index("--rdzv-endpoint") + 1] == "first:29500"
    assert first[first.index("--nnodes") + 1] == "2"
    assert started(SLURM_RESTART_COUNT="1") == [*first, "--resume"]


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_a_job_asks_for_the_gpus_that_it_starts_ranks_on_and_its_command_is_one_of_ours(file: Path) -> None:
    (wanted,) = (found for found in documents(file) if found["kind"] != "Service")
    for number, pod in pods(file):
        (container,) = pod["containers"]
        command = container["command"]
        ranks = option(command, "nproc-per-node") or wanted["spec"]["nprocPerNode"]
        assert int(ranks) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert int(option(command, "nnodes") or wanted["spec"]["elasticPolicy"]["maxReplicas"]) == number
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        words = command[command.index("ossia") + 1 :]
        group = typer.main.get_command(app)
        with group.make_context("ossia", words, resilient_parsing=True) as context:
            name, body, arguments = group.resolve_command(context, words)
        assert name == "train"
        with body.make_context(name, list(arguments)) as parsed:
            assert str(parsed.params["recipe"]) == "recipe.yaml"
            assert parsed.params["resume"], "a pod that is started again would find a run that is there and refuse"


def test_the_jobs_pods_find_each_other_under_the_names_that_they_have() -> None:
    service, job = documents(FOLDER / "job.yaml")
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    host, port = (option(container["command"], "rdzv-endpoint") or "").split(":")
    assert host == f"{name}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"]


def test_kubeflows_container_has_the_name_that_it_looks_for() -> None:
    ((_, pod),) = pods(FOLDER / "pytorchjob.yaml")
    assert [container["name"] for container in pod["containers"]] == ["pytorch"]
