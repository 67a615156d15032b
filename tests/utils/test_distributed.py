"""The choice of devices, on machines with other GPUs than this one."""

import pytest
import torch

from utils import distributed
from utils.distributed import choose_devices, describe
from utils.errors import BadInput


@pytest.fixture
def gpus(monkeypatch):
    def there_are(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")

    return there_are


def test_no_gpu(gpus, capsys):
    gpus(0)
    assert choose_devices("0,1") == [torch.device("cpu")]
    assert "CPU" in capsys.readouterr().out
    assert describe([torch.device("cpu")]).startswith("CPU, ")


def test_all_there(gpus, capsys):
    gpus(4)
    devices = choose_devices("0,2,3")
    assert [device.index for device in devices] == [0, 2, 3]
    assert capsys.readouterr().out == ""
    assert describe(devices) == "GPU 0 (card), 2 (card), 3 (card), DataParallel"


def test_fewer_there(gpus, capsys):
    gpus(2)
    assert [device.index for device in choose_devices("0,1,2,3")] == [0, 1]
    assert "using 0,1" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--gpu-id 2,3"):
        choose_devices("2,3")


@pytest.mark.parametrize("text", ["", "a", "-1", "0,0", "0,"])
def test_no_list_of_gpus(gpus, text):
    gpus(2)
    with pytest.raises(BadInput, match="--gpu-id"):
        choose_devices(text)


def test_the_local_rank_decides(gpus, monkeypatch):
    gpus(4)
    monkeypatch.setattr(distributed, "PROCESSES", 4)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 3)
    assert choose_devices("0") == [torch.device("cuda", 3)]
    monkeypatch.setattr(distributed, "LOCAL_PROCESSES", 4)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 0)
    gpus(2)
    with pytest.raises(BadInput, match="--nproc-per-node 2 at most"):
        choose_devices("0")
