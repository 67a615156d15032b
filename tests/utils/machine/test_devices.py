"""The choice of devices, on machines with other GPUs than this one."""

from argparse import Namespace

import pytest
import torch

from utils.errors import BadInput
from utils.machine import torchrun
from utils.machine.devices import choose_devices, describe_devices, open_devices


@pytest.fixture
def machine(monkeypatch):
    """Make it one of so many GPUs, on which so many processes train."""

    def is_of(gpus: int, processes: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
        for name, value in (("PROCESSES", processes), ("LOCAL_PROCESSES", processes), ("LOCAL_RANK", processes - 1)):
            monkeypatch.setattr(torchrun, name, value)

    return is_of


def test_devices(machine, monkeypatch, capsys):
    machine(0)
    assert choose_devices("0,1") == [torch.device("cpu")]
    machine(4)
    assert describe_devices(choose_devices("0,2,3")) == "GPU 0 (card), 2 (card), 3 (card), DataParallel"
    machine(4, 4)
    assert choose_devices("0") == [torch.device("cuda", 3)]  # the local rank decides
    assert "GPU" in capsys.readouterr().out
    monkeypatch.setattr(torchrun, "PROCESSES", 8)  # on two such machines
    assert choose_devices("0") == [torch.device("cuda", 3)]
    machine(2)
    assert choose_devices("0,1,2,3") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert "--gpu-id 0,1,2,3: this machine has 2 GPUs; using 0,1\n" in capsys.readouterr().out


def test_what_can_not_be_had(machine):
    for place, sync_bn, text in (((2,), False, "--compile"), ((0, 2), True, "--sync-bn"),
        ((2, 4), False, "--nproc-per-node 2 at most"), ((1,), False, "--gpu-id 2,1")):  # fmt: skip
        machine(*place)
        with pytest.raises(BadInput, match=text):
            open_devices(Namespace(gpu_id="2,1" if place == (1,) else "0,1", compile=True, sync_bn=sync_bn))
