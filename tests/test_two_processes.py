"""What two processes do together, in forks of this one that meet over gloo, as under torchrun."""

import multiprocessing
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import imagenet
import models
from benchmarks.gpu import run_of
from models.layers import Conv2d
from tests.helpers import BATCH_NORM, EXCITED, assert_close, checkpoint, copy_folder, run_command
from utils.errors import BadInput
from utils.images.samples import Batch
from utils.machine import distributed, torchrun
from utils.machine.devices import default_workers
from utils.machine.signals import Stop
from utils.network.parallel import share_buffers
from utils.network.random_state import seed_dropout
from utils.runs.checkpoint import LAST, PREVIOUS

CPU = torch.device("cpu")


def in_two(body: Callable[[int], object], meets: bool = True, port: int = 0) -> list:
    """What the body gives in each of two processes, by rank; they meet before it, unless it does that itself.

    Args:
        port: of a store that is kept from one call to the next; otherwise the first process has one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    fork = multiprocessing.get_context("fork")

    def process(rank: int, pipe) -> None:
        torchrun.PROCESSES = torchrun.LOCAL_PROCESSES = 2
        torchrun.RANK = torchrun.LOCAL_RANK = rank
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            if meets:
                distributed.initialize(CPU)
            pipe.send(body(rank))
            distributed.leave()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    both = [fork.Process(target=process, args=(rank, send)) for rank, (_, send) in enumerate(pipes)]
    for one in both:
        one.start()
    for _, send in pipes:
        send.close()  # so that a process that fails ends the wait for its answer
    try:
        return [receive.recv() for receive, _ in pipes]
    finally:
        for one in both:
            one.join()
        assert [one.exitcode for one in both] == [0, 0]


def test_a_run_of_two_is_that_of_one(float64, images, tmp_path, stop_after):
    """With a dropout of 0, as each process has its own; a signal to the second one stops both."""
    words = [*EXCITED, "-d", images, "--epochs", 2, "--iter-size", 1, "--ema", 0.8]
    assert run_command(*words, "-c", tmp_path / "one") == 0

    def stopped(rank):
        if rank == 1:
            stop_after(2)
        return run_command(*words, "-c", tmp_path / "two")

    assert in_two(stopped, meets=False) == [143, 143]
    saved = checkpoint(tmp_path / "two")
    assert (saved["epoch"], saved["step"], saved["sums"][3]) == (0, 2, 8)
    assert in_two(lambda rank: run_command("--resume", tmp_path / "two"), meets=False) == [0, 0]
    assert_close(tmp_path / "one", tmp_path / "two", 1e-9)
    words = ["-e", "--resume", tmp_path / "two", "--predictions"]
    assert run_command(*words, tmp_path / "by one") == 0
    assert in_two(lambda rank: run_command(*words, tmp_path / "by two"), meets=False) == [0, 0]
    assert (tmp_path / "by two").read_text() == (tmp_path / "by one").read_text()


def test_both_validate_with_the_statistics_that_are_saved(command, images, tmp_path):
    """BatchNorm's are each process's own while it trains; the log's loss is that of the checkpoint."""
    words = [*BATCH_NORM, "-d", images, "--epochs", 1, "-c", tmp_path / "run"]
    assert in_two(lambda rank: run_command(*words), meets=False) == [0, 0]
    ended = command("-e", "--resume", tmp_path / "run")
    assert f"loss {checkpoint(tmp_path / 'run')['log'][-1][2]:.4f} " in ended.out


def test_one_process_draws_the_demo_for_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.images.demo.IMAGES", {"train": 1, "val": 1})
    words = ["--demo", "-a", "l_tiny", "--epochs", 1, "-j", 0, "--train-batch", 4]
    assert in_two(lambda rank: run_command(*words), meets=False) == [0, 0]


def test_sums_and_the_largest_are_over_both():
    def body(rank):
        values = distributed.total(torch.tensor([1.0, 10.0 * (rank + 1)]))
        return values.tolist(), distributed.largest(3 + 4 * rank), distributed.gather([rank, rank + 0.5])

    assert in_two(body) == 2 * [([2.0, 30.0], 7, [0, 0.5, 1, 1.5])]


def test_the_row_before_ones_own_is_the_last_of_the_process_before():
    def body(rank):
        images = torch.arange(48).reshape(2, 2, 3, 4)[rank].permute(2, 0, 1)[:, None]  # not contiguous
        return distributed.after_previous(images).tolist()

    whole = torch.arange(48).reshape(2, 2, 3, 4).permute(0, 3, 1, 2)[:, :, None].flatten(0, 1)
    assert in_two(body) == [whole[[7, 0, 1, 2, 3]].tolist(), whole[[3, 4, 5, 6, 7]].tolist()]
    assert distributed.after_previous(whole) is whole


def test_both_must_begin_alike():
    def body(rank):
        distributed.check_same({"lr": 0.1})
        try:
            distributed.check_same({"lr": 0.1 + rank})
        except BadInput as error:
            return str(error)

    assert all("the processes have different options" in text for text in in_two(body))


def test_both_must_see_the_same_images_and_resume_the_same_checkpoint(images, finished, tmp_path):
    more = copy_folder(images, tmp_path / "more")
    shutil.copyfile(more / "train/ring/0.jpg", more / "train/ring/more.jpg")
    ends = in_two(lambda rank: run_command(*EXCITED, "-d", (images, more)[rank], "-c", tmp_path / "run"), meets=False)
    assert ends == [2, 2]
    files = finished / LAST, finished / PREVIOUS
    words = ["--epochs", 3, "-c", tmp_path / "run"]
    assert in_two(lambda rank: run_command("--resume", files[rank], *words), meets=False) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_after_a_restart_both_meet_anew_and_one_says_why_they_fail(monkeypatch):
    """torchrun keeps its store, in which the addresses of the processes that are gone are."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(torchrun, "UNDER_TORCHRUN", True)
    for restarts in range(2):
        monkeypatch.setattr(torchrun, "RESTARTS", restarts)
        assert sorted(in_two(lambda rank: distributed.is_first_to_fail(), port=store.port)) == [False, True]


def test_before_validation_the_first_ones_buffers_are_everybodys():
    def body(rank):
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(1.0 + rank)
        share_buffers(norm)
        return norm.running_mean.tolist()

    assert in_two(body) == 2 * [[1.0, 1.0]]


def test_no_process_leaves_before_the_others(tmp_path):
    """As torchrun would end these."""

    def body(rank):
        if rank == 1:
            time.sleep(1)
            (tmp_path / "done").touch()
        distributed.leave()
        return (tmp_path / "done").exists()

    assert in_two(body) == [True, True]


def batches(count: int, images: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, images, 3, 8, 8), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 5, (count, images), generator=generator)
    return [Batch(*batch, 0, []) for batch in zip(pixels, targets, strict=True)]


def network(drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    body = Conv2d(3, 8, 3, formulation="paper"), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Dropout(drop), nn.Linear(8, 5)).double()


@pytest.mark.parametrize("iter_size, words", [(1, ""), (3, ""), (3, "--mixup 0.5"), (3, "--mixup 1 --cutmix 1 --bce")])
def test_two_halves_of_each_batch_are_the_batch(iter_size, words):
    """Weights, sums of the scores and the largest gradient, to the rounding of float64; mixed across the halves."""
    words = f"--iter-size {iter_size} {words}"

    def train(model, given):
        run = run_of(model, words, [CPU])
        for _ in range(2):
            imagenet.train_step(run, iter(given), Stop())
        run.collect()
        return [parameter.tolist() for parameter in run.model.parameters()], run.scores.sums

    def body(rank):
        halves = [Batch(*(part.chunk(2)[rank] for part in batch[:2]), 0, []) for batch in batches(iter_size, 6)]
        return train(network(), halves)

    weights, sums = train(network(), batches(iter_size, 6))
    for ours, our_sums in in_two(body):
        assert our_sums == pytest.approx(sums, rel=1e-9)
        for one, other in zip(ours, weights, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-9, atol=1e-12)


def test_one_reduction_for_an_optimizer_step():
    """In the last micro-batch alone; gradients of those before it gather in each process."""

    def body(rank):
        run = run_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "--iter-size 3", [CPU])
        reduced = []

        def hook(state, bucket):
            reduced.append(bucket.buffer().numel())
            return (
                torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
            )

        run.network.register_comm_hook(None, hook)
        imagenet.train_step(run, iter(batches(3, 2)), Stop())
        return reduced

    assert in_two(body) == 2 * [[192 * 5 + 5]]


def test_the_processes_of_a_run_drop_different_features(images, tmp_path):
    def body(rank):
        dropped, create = [], models.create

        def note(module, inputs, output):
            if module.training and not output.is_meta:
                dropped.append((inputs[0] == 0).tolist())

        def recording(*words, **options):
            model = create(*words, **options)
            model.fc.register_forward_hook(note)
            return model

        with mock.patch.object(models, "create", recording):
            assert run_command(*EXCITED, "-d", images, "--drop", 0.5, "--epochs", 1, "-c", tmp_path / "run") == 0
        return dropped

    one, other = in_two(body, meets=False)
    assert len(one) == len(other) == 3
    assert not any(mine == theirs for mine in one for theirs in other)


def test_each_process_and_step_has_a_dropout_of_its_own(monkeypatch):
    """The first process goes on with the run's random state; the others' is the same again after resuming."""
    drawn = {}
    for place in [
        (rank, seed, epoch, step) for rank in (0, 1, 2) for seed in (0, 1) for epoch in (0, 1) for step in (0, 1)
    ]:
        rank, *rest = place
        monkeypatch.setattr(torchrun, "RANK", rank)
        draws = []
        for start in (3, 4):
            torch.manual_seed(start)
            seed_dropout(*rest)
            draws.append(torch.rand(4).tolist())
        torch.manual_seed(3)
        assert (draws[0] == draws[1]) is (rank > 0)
        assert rank > 0 or draws[0] == torch.rand(4).tolist()
        drawn[place] = tuple(draws[0])
    others = [draws for (rank, *_), draws in drawn.items() if rank > 0]
    assert len(set(others)) == len(others) == 16


def test_workers_are_divided_over_the_processes(monkeypatch):
    """By default as many in all as the cores that each process has, 8 for each at most."""
    for processes, cores, workers in ((2, 6, 6), (4, 64, 32), (2, 1, 2)):
        monkeypatch.setattr(torchrun, "PROCESSES", processes)
        monkeypatch.setattr(torchrun, "LOCAL_PROCESSES", processes)
        monkeypatch.setattr("utils.machine.devices.cores", lambda cores=cores: cores)
        assert default_workers("0") == workers
