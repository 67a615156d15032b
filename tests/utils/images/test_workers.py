"""What workers make of samples, and what is known of them."""

import errno
import multiprocessing
import os
import signal
import time
from argparse import Namespace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from tests.helpers import PATIENCE, in_a_process
from utils.errors import RunFailed
from utils.images.folders import ImageFolder
from utils.images.samples import Sample, Samples, collate
from utils.images.workers import Workers, start_worker


def test_a_batch_of_samples():
    """Two images replace others; for one, two could not be decoded; of one, the disk failed."""
    pixels = torch.randint(0, 256, (5, 3, 5, 5), dtype=torch.uint8)
    batch = collate([
        Sample(pixels[0], 7, [], index=40),
        Sample(pixels[1], 5, ["a is bad"], index=41),
        Sample(None, -1, ["b is bad", "c is bad"]),
        Sample(pixels[2], 7, [], index=42),
        Sample(None, -1, [], "the disk fails"),
        Sample(pixels[3], 6, [], index=43),
        Sample(pixels[4], 5, ["d is bad"], index=44),
    ])  # fmt: skip
    assert torch.equal(batch.images, pixels)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.targets, batch.indices) == ([7, 5, 7, 6, 5], [40, 41, 42, 43, 44])
    assert (batch.bad, batch.reasons) == (3, ["a is bad", "b is bad", "c is bad", "d is bad"])
    assert batch.failure == "the disk fails"
    assert collate([Sample(None, -1, ["bad"])]).images.shape[:2] == (0, 3)


@pytest.mark.parametrize(
    "evaluate, val_size, pixels",
    [(False, 100, 40 * 100**2), (True, 100, 10 * 100**2), (False, 300, 10 * 300**2), (True, 30, 10 * 30**2)],
)
def test_shared_memory_that_may_not_suffice_is_told(monkeypatch, capsys, evaluate, val_size, pixels):
    """It holds two batches of each worker, of 8 bits a colour."""
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    args = Namespace(train_batch=40, test_batch=10, image_size=100, evaluate=evaluate)
    needed = 3 * 2 * 3 * pixels
    for free, is_told in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(os, "statvfs", lambda path, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        Workers(3, is_gpu=False).warn_of_shared_memory(args, val_size)
        expected = (
            f"/dev/shm has {free / 2**20:.0f} MiB free, and batches for 3 workers may take {needed / 2**20:.0f}: "
        )
        assert capsys.readouterr().out.startswith(expected) is is_told


def test_one_lost_worker_is_enough():
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=time.sleep, args=(600,)), fork.Process(target=os._exit, args=(1,))]
    workers = Workers(2, is_gpu=False)
    workers.processes += processes
    try:
        for process in processes:
            process.start()
        processes[1].join()
        with pytest.raises(RunFailed, match="a process that loads images died"), workers:
            raise RuntimeError
        processes[0].join(PATIENCE)
        assert processes[0].exitcode == -signal.SIGKILL
    finally:
        processes[0].kill()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the loader is left half-made
def test_a_worker_that_can_not_be_started(images, monkeypatch):
    """As where the system allows no more processes: the first ones end as well."""
    start, calls = multiprocessing.process.BaseProcess.start, []

    def failing(process):
        calls.append(process)
        if len(calls) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", failing)
    splits = {"val": Samples(ImageFolder(images / "val"), 32)}
    message = r"can't start 2 processes that load images .*: lower --workers"
    with pytest.raises(RunFailed, match=message), Workers(2, is_gpu=False) as workers:
        workers.load(splits, iter([[("val", 0, 0)]]))
    calls[0].join(PATIENCE)
    assert calls[0].exitcode == -signal.SIGKILL


def test_a_worker_ends_with_the_main_process(tmp_path):
    """PyTorch watches whoever started it, which may be the fork server."""

    def body() -> int:
        multiprocessing.parent_process = lambda: SimpleNamespace(join=(tmp_path / "the main process ended").touch)
        start_worker(0)
        time.sleep(PATIENCE)
        return 2

    assert in_a_process(body) == 1
    assert (tmp_path / "the main process ended").exists()


@pytest.mark.parametrize("is_gpu", [False, True])
def test_batches_for_a_gpu_are_in_pinned_memory(monkeypatch, is_gpu):
    """Only from there are they copied without waiting."""
    loader = Mock(return_value=[])
    monkeypatch.setattr("utils.images.workers.DataLoader", loader)
    Workers(0, is_gpu).load({}, iter([]))
    assert loader.call_args.kwargs["pin_memory"] is is_gpu
