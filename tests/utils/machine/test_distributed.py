"""The choice of devices, on machines with other GPUs than this one; parts of batches; commands to paste."""

import runpy
import shlex
import sys
from argparse import Namespace

import pytest
import torch

from tests.helpers import ROOT
from utils.errors import BadInput
from utils.machine import distributed
from utils.machine.distributed import choose_devices, command, describe, join, share


@pytest.fixture
def machine(monkeypatch):
    """Make it one of so many GPUs, on which so many processes train."""

    def is_of(gpus: int, processes: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
        for name, value in (("PROCESSES", processes), ("LOCAL_PROCESSES", processes), ("LOCAL_RANK", processes - 1)):
            monkeypatch.setattr(distributed, name, value)

    return is_of


def test_devices(machine, monkeypatch, capsys):
    machine(0)
    assert choose_devices("0,1") == [torch.device("cpu")]
    machine(4)
    assert describe(choose_devices("0,2,3")) == "GPU 0 (card), 2 (card), 3 (card), DataParallel"
    machine(4, 4)
    assert choose_devices("0") == [torch.device("cuda", 3)]  # the local rank decides
    assert "GPU" in capsys.readouterr().out
    monkeypatch.setattr(distributed, "PROCESSES", 8)  # on two such machines
    assert choose_devices("0") == [torch.device("cuda", 3)]
    machine(2)
    assert choose_devices("0,1,2,3") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert "--gpu-id 0,1,2,3: this machine has 2 GPUs; using 0,1\n" in capsys.readouterr().out


def test_what_can_not_be_had(machine, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for place, sync_bn, text in (((2,), False, "--compile"), ((0, 2), True, "--sync-bn"), ((0, 2), False, "WORLD_SIZE"),
        ((2, 4), False, "--nproc-per-node 2 at most"), ((1,), False, "--gpu-id 2,1")):  # fmt: skip
        machine(*place)
        with pytest.raises(BadInput, match=text):
            join(Namespace(gpu_id="2,1" if place == (1,) else "0,1", compile=True, sync_bn=sync_bn))


@pytest.mark.parametrize(
    "processes, expected", [(8, ["--nproc-per-node", "8"]), (16, ["--nnodes", "2", "--nproc-per-node", "8"])]
)
def test_the_command_under_torchrun(machine, monkeypatch, processes, expected):
    """As many processes on each machine as there are."""
    machine(8, 8)
    monkeypatch.setattr(distributed, "PROCESSES", processes)
    monkeypatch.setattr(distributed, "UNDER_TORCHRUN", True)
    monkeypatch.setattr(sys, "argv", ["imagenet.py"])
    assert shlex.split(command(["--resume=a b"]))[1:] == [*expected, "imagenet.py", "--resume=a b"]


MEETING = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("name, value", [(name, None) for name in MEETING] + [("RANK", "2"), ("MASTER_PORT", "x")])
def test_an_environment_that_speaks_of_several_processes_and_not_how_they_meet(machine, monkeypatch, name, value):
    machine(0, 2)
    for variable in MEETING:
        monkeypatch.setenv(variable, MEETING[variable])
    monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(BadInput, match=f"^WORLD_SIZE is 2 in the environment, without a usable {name}: start by torch"):
        join(Namespace(gpu_id="0", compile=False, sync_bn=False))


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
    names = runpy.run_path(distributed.__file__)
    found = [names[name] for name in ("PROCESSES", "RANK", "LOCAL_RANK", "LOCAL_PROCESSES", "RESTARTS")]
    assert tuple(found) == expected


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_parts_of_a_batch_are_the_batch(monkeypatch, processes):
    monkeypatch.setattr(distributed, "PROCESSES", processes)
    for size in (1, 7, 8, 24):
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "RANK", rank)
            parts.append(share(list(range(size))))
        assert [item for part in parts for item in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) == (size % processes > 0)


def test_commands_to_paste(machine, monkeypatch, tmp_path):
    python, torchrun = (tmp_path / ".venv" / "bin" / name for name in ("python", "torchrun"))
    python.parent.mkdir(parents=True)
    for program in (python, torchrun):
        program.touch(0o755)
    monkeypatch.setattr(sys, "argv", ["a folder/imagenet.py"])
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert command(["--resume=x y"]) == ".venv/bin/python 'a folder/imagenet.py' '--resume=x y'"
    monkeypatch.chdir(ROOT)
    assert command([]) == f"{python} 'a folder/imagenet.py'"
    monkeypatch.setenv("PATH", str(python.parent))
    assert command([]) == "python 'a folder/imagenet.py'"
    machine(0, 4)
    monkeypatch.setattr(distributed, "UNDER_TORCHRUN", True)
    assert command([]) == "torchrun --nproc-per-node 4 'a folder/imagenet.py'"
