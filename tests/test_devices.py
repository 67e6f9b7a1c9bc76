"""Claims about devices.py and CLUSTER.md: several processes train the model of one, and are told of each other."""

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import tyro

import devices
import model
from conftest import write_linear
from scales import BadInput
from train import Settings

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("variables, words, known", [
    ({}, {}, None),
    ({"SLURM_NTASKS": "8"}, {}, None),  # of a batch script, which srun has not multiplied
    ({"SLURM_STEP_NUM_TASKS": "8"}, {}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "8"}, {}, {}),
    ({"SLURM_STEP_NUM_TASKS": "8"}, {"coordinator": "node1:4000", "processes": 8, "process": 7},
     {"coordinator_address": "node1:4000", "num_processes": 8, "process_id": 7,
      "cluster_detection_method": "deactivate"})])
def test_processes_are_told_of_each_other(monkeypatch, variables, words, known):
    """srun and mpirun let JAX find out who is who, --coordinator tells it, and one process asks nobody."""
    for name in ("SLURM_NTASKS", *devices.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **what: told.append(what))
    assert devices.join(Settings(**words)) == (1 if known is None else 8)
    assert told == ([] if known is None else [known | {"initialization_timeout": devices.PATIENCE}])


@pytest.mark.parametrize("words, message", [
    ({"coordinator": "node1:4000", "processes": 2, "process": 2}, "--process 2"),
    ({"coordinator": "node1", "processes": 2}, "--coordinator node1 .*host:port"), ({"processes": 2}, "--coordinator")])
def test_processes_that_cannot_meet_say_so(words, message):
    """A number that is none of theirs, or no place to meet, ends in one line and not in waiting."""
    with pytest.raises(BadInput, match=message):
        devices.join(Settings(**words))


def test_two_processes_are_one(tmp_path):
    """Two processes of one device each, which meet on the loopback, train the model of one process with two devices:
    the same batches, the mean of the same gradients, and one writer."""
    write_linear(tmp_path / "smoke" / "screens" / "dags", systems=8, genes=4)
    small = "--width 8 --heads 1 --depth 1 --registers 1 --micro-batch 2 --accumulate 2 --updates 3 --log-every 1"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"--coordinator localhost:{free.getsockname()[1]} --processes 2 --process"
    running, environment = [], os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for words in (f"--name two {meet} 0", f"--name two {meet} 1", "--name one"):
        command = f"train.py --screen dags --scale smoke --out {tmp_path} {small} {words}"
        running.append(subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    told = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], told
    assert "3 updates" in told[0][0] and "3 updates" not in told[1][0]  # only the first of them prints
    folders = [model.run_folder(Settings(scale="smoke", out=tmp_path), name, 0) for name in ("one", "two")]
    one, two = (eqx.filter(model.load_model(folder / "model.eqx")[1], eqx.is_array) for folder in folders)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_page_on_clusters_has_commands_that_can_be_given():
    """Every `python ...` of CLUSTER.md is understood by its script, word by word, and the page is short."""
    page = (ROOT / "CLUSTER.md").read_text(encoding="utf-8")
    commands = re.findall(r"python (\w+)\.py ([^\n`#&]*)", page)
    assert len(commands) > 8 and len(page.encode()) < 4000
    for script, words in commands:
        words = re.sub(r"\$\w+", "1", words)  # a variable of the shell: a number
        tyro.cli(importlib.import_module(script).Settings, args=shlex.split(words))
