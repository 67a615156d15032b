"""Fixtures that more than one test file needs."""

import contextlib
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # a CPU runs Triton's kernels; read when torchvision imports Triton

import models
from models.excitation import FORMULATIONS
from tests.helpers import EXCITED, draw_folder, register_tiny, run_command, send
from utils.machine.signals import ENDING


@pytest.fixture(scope="session", autouse=True)
def surroundings() -> Iterator[None]:
    """One thread, as several that wait for each other take a busy machine's whole time; and a small network.

    What a shell starts in the background ignores some signals, and what the tests start would inherit that.
    """
    register_tiny()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=FORMULATIONS)
def formulation(request) -> str:
    """Each of them."""
    return request.param


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """13 training and 7 validation images of two classes; not to be changed."""
    return draw_folder(tmp_path_factory.mktemp("images"), {"train": 6, "val": 3})


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory) -> Path:
    """A run of two epochs; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_command(*EXCITED, "-d", images, "--epochs", 2, "-c", folder) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run imagenet.py with these words, in this process; gives the exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["imagenet.py"])

    def call(*words) -> SimpleNamespace:
        capsys.readouterr()
        status = run_command(*words)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


@pytest.fixture
def stop_after(monkeypatch):
    """Send the coming run a signal in the forward pass of this number, of training or validation, and no later run."""

    def set_up(passes: int, number: signal.Signals = signal.SIGTERM) -> None:
        counted, create = iter(range(1, 10**6)), models.create

        def count(module: nn.Module, inputs: tuple, logits: torch.Tensor) -> None:
            if not logits.is_meta and next(counted) == passes:
                send(number)

        def create_with_count(*words, **options) -> nn.Module:
            model = create(*words, **options)
            model.register_forward_hook(count)
            return model

        monkeypatch.setattr(models, "create", create_with_count)

    return set_up


class _Broadcast(torch.autograd.Function):
    """The first device keeps the tensors, the others get contiguous copies; gradients are contiguous."""

    @staticmethod
    def forward(ctx, devices, *tensors):
        ctx.count = len(tensors)
        copies = (tensor.contiguous().clone() for _ in devices[1:] for tensor in tensors)
        return (*tensors, *copies)

    @staticmethod
    def backward(ctx, *grads):
        parts = [grads[start : start + ctx.count] for start in range(0, len(grads), ctx.count)]
        return None, *(sum(part[1:], part[0]).contiguous() for part in zip(*parts, strict=True))


@pytest.fixture
def gpus(monkeypatch) -> SimpleNamespace:
    """nn.DataParallel's own code takes CPU for GPUs: only copies, streams and guards are replaced.

    Gives how many tensors each broadcast sends, and the types of what is scattered.
    """
    seen = SimpleNamespace(sent=[], scattered=[])

    def broadcast(tensors, devices, detach=False):
        seen.sent += [len(tensors)] if tensors else []
        copies = [tensor.detach() if detach else tensor for tensor in _Broadcast.apply(devices, *tensors)]
        return [copies[start : start + len(tensors)] for start in range(0, len(copies), len(tensors) or 1)]

    def scatter(devices, sizes, dim, tensor):
        seen.scattered.append(tensor.dtype)
        return tuple(part.clone() for part in tensor.chunk(len(devices), dim))

    def on_the_cpu(self, *arguments):
        init(self, *arguments)
        self.src_device_obj = torch.device("cpu")

    init, is_enabled = nn.DataParallel.__init__, torch.is_autocast_enabled
    names = ("data_parallel", "replicate", "scatter_gather")
    parallel, replicate, scatter_gather = (importlib.import_module(f"torch.nn.parallel.{name}") for name in names)
    for place, name, value in (
        (nn.DataParallel, "__init__", on_the_cpu),
        (parallel, "_get_available_device_type", lambda: "cuda"),
        (parallel, "_check_balance", lambda ids: None),
        (replicate, "_broadcast_coalesced_reshape", broadcast),
        (scatter_gather, "Scatter", SimpleNamespace(apply=scatter)),
        (scatter_gather, "Gather", SimpleNamespace(apply=lambda device, dim, *tensors: torch.cat(tensors, dim))),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda: torch.device("cpu")),
        (torch.accelerator, "current_stream", lambda device: contextlib.nullcontext()),
        (torch.accelerator, "device_index", lambda device: contextlib.nullcontext()),
        (torch.cuda, "current_stream", contextlib.nullcontext),  # torch 2.8 asks these three
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.cuda, "device", contextlib.nullcontext),
        (torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device)),  # without a device, CUDA's
    ):
        monkeypatch.setattr(place, name, value)
    return seen
