"""The SLURM script before SLURM's own controller, which says when a job would start: two machines of eight GPUs."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.examples.test_cluster import SBATCH

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/pid
SlurmctldLogFile={folder}/log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
# machines that would be started when they are needed: none has to be there
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=600
NodeName=n[1-2] CPUs=64 RealMemory=1100000 Gres=gpu:8 State=CLOUD
PartitionName=all Nodes=n[1-2] Default=YES State=UP
"""
Submit = Callable[[str, str], tuple[int, str]]

pytestmark = pytest.mark.skipif(
    not (shutil.which("sbatch") and shutil.which("slurmctld")), reason="needs SLURM's sbatch and slurmctld"
)


@pytest.fixture(scope="module")
def submit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submit]:
    """`submit(old, new)`: exit code and words of `sbatch --test-only` for the script with `old` replaced by `new`."""
    folder = tmp_path_factory.mktemp("slurm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, port=port, user=getpass.getuser()))
    (folder / "gres.conf").write_text("AutoDetect=off\n")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / "said").open("w") as said:
        controller = subprocess.Popen(["slurmctld", "-D"], env=environment, stdout=said, stderr=said)
    try:
        end, log = time.monotonic() + 30, folder / "log"
        while not (log.exists() and "Running as primary controller" in log.read_text()):
            assert controller.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)

        def submitted(old: str, new: str) -> tuple[int, str]:
            text = SBATCH.read_text(encoding="utf-8")
            assert old in text
            (folder / "job.sbatch").write_text(text.replace(old, new))
            words = ["sbatch", "--test-only", str(folder / "job.sbatch"), "recipe.yaml"]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
            return done.returncode, done.stderr

        yield submitted
    finally:
        controller.terminate()
        controller.wait(30)


def test_the_controller_would_start_it_on_both_machines(submit: Submit) -> None:
    code, said = submit("", "")
    assert code == 0, said
    assert "using 128 processors on nodes n[1-2] in partition all" in said


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("--gpus-per-node=8", "--gpus-per-node=9", "Requested node configuration is not available"),
        ("--nodes=2", "--nodes=3", "not available"),
        ("--cpus-per-task=64", "--cpus-per-task=65", "not available"),
        ("--gpus-per-node=8", "--gpus-per-nodes=8", "unrecognized option"),
        ("--time=24:00:00", "--time=a-day", "Invalid --time specification"),
    ],
)
def test_what_no_machine_has_and_what_is_misspelt_is_refused(submit: Submit, old: str, new: str, says: str) -> None:
    code, said = submit(old, new)
    assert code != 0
    assert says in said
