"""What launchers leave in the environment, and commands to paste."""

import runpy
import shlex
import sys

import pytest
import torch

from tests.helpers import ROOT
from utils.errors import BadInput
from utils.machine import distributed, torchrun
from utils.machine.torchrun import shell_command


@pytest.mark.parametrize(
    "processes, expected", [(8, ["--nproc-per-node", "8"]), (16, ["--nnodes", "2", "--nproc-per-node", "8"])]
)
def test_the_command_under_torchrun(monkeypatch, processes, expected):
    """As many processes on each machine as there are."""
    monkeypatch.setattr(torchrun, "PROCESSES", processes)
    monkeypatch.setattr(torchrun, "LOCAL_PROCESSES", 8)
    monkeypatch.setattr(torchrun, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(sys, "argv", ["imagenet.py"])
    assert shlex.split(shell_command(["--resume=a b"]))[1:] == [*expected, "imagenet.py", "--resume=a b"]


MEETING = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("name, value", [(name, None) for name in MEETING] + [("RANK", "2"), ("MASTER_PORT", "x")])
def test_an_environment_that_speaks_of_several_processes_and_not_how_they_meet(monkeypatch, name, value):
    monkeypatch.setattr(torchrun, "PROCESSES", 2)
    for variable in MEETING:
        monkeypatch.setenv(variable, MEETING[variable])
    monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(BadInput, match=f"^WORLD_SIZE is 2 in the environment, without a usable {name}: start by torch"):
        distributed.join(torch.device("cpu"))


@pytest.mark.parametrize("variables, expected", [
    ({}, (1, 0, 0, 1, 0)), ({"WORLD_SIZE": "0"}, (1, 0, 0, 1, 0)),
    ({"WORLD_SIZE": "2(x2)", "RANK": "3"}, (1, 0, 0, 1, 0)),
    ({"RANK": "5", "LOCAL_RANK": "1"}, (1, 0, 0, 1, 0)), ({"WORLD_SIZE": "", "RANK": ""}, (1, 0, 0, 1, 0)),
    ({"WORLD_SIZE": "8", "RANK": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "3"},
     (8, 6, 2, 4, 3)),
])  # fmt: skip
def test_variables_of_launchers(monkeypatch, variables, expected):
    """torchrun's are numbers; others leave texts there."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    names = runpy.run_path(torchrun.__file__)
    found = [names[name] for name in ("PROCESSES", "RANK", "LOCAL_RANK", "LOCAL_PROCESSES", "RESTARTS")]
    assert tuple(found) == expected


def test_commands_to_paste(monkeypatch, tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for program in (python, python.with_name("torchrun")):
        program.touch(0o755)
    monkeypatch.setattr(sys, "argv", ["a folder/imagenet.py"])
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert shell_command(["--resume=x y"]) == ".venv/bin/python 'a folder/imagenet.py' '--resume=x y'"
    monkeypatch.chdir(ROOT)
    assert shell_command([]) == f"{python} 'a folder/imagenet.py'"
    monkeypatch.setenv("PATH", str(python.parent))
    assert shell_command([]) == "python 'a folder/imagenet.py'"
    for name in ("PROCESSES", "LOCAL_PROCESSES"):
        monkeypatch.setattr(torchrun, name, 4)
    monkeypatch.setattr(torchrun, "UNDER_TORCHRUN", True)
    assert shell_command([]) == "torchrun --nproc-per-node 4 'a folder/imagenet.py'"
