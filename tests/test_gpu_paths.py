"""What runs differently on GPUs, on a machine without one: torch's own DataParallel over pretended devices, stacks of
layers and their graphs, late reads, a loader's workers; how a run meets its devices and other processes."""

import contextlib
import copy
import importlib
import itertools
import multiprocessing
import os
import socket
import warnings
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils.pin_memory import pin_memory

import imagenet
import models
from benchmarks.gpu import batches, run_of, train
from models import fused, layers, stacked
from models.layers import EXCITATIONS, FORMULATIONS, Conv2d, excited_once, group_norm
from tests.helpers import EXCITED, SIZES, SMALL, assert_same_run, checkpoint
from utils import command as commands
from utils import data as loading
from utils import distributed
from utils.checkpoint import load
from utils.data import Batch, Data, Sample, end_workers
from utils.distributed import check_works, choose_devices, default_workers, smallest_part
from utils.errors import BadInput, NotFinite
from utils.meters import Scores
from utils.signals import Stop

BOTH = pytest.mark.parametrize("formulation", FORMULATIONS)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
CPU = [torch.device("cpu", index) for index in range(4)]  # the pretended GPUs 0 to 3


def network(formulation: str = "channel") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(Conv2d(3, 32, 3, formulation=formulation), group_norm(32), nn.ReLU()),
        *(Conv2d(32, 32, 1, formulation=formulation), group_norm(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    )


def validate(model: nn.Module, data: list[Batch], devices: list[torch.device], options: str = "") -> Scores:
    args = imagenet.build_parser().parse_args(options.split())
    source = SimpleNamespace(validation=lambda: iter(data), val_batches=len(data), waited=0.0)
    return imagenet.validate(model, source, devices, args, Stop())


class _Broadcast(torch.autograd.Function):
    """As torch's: the first device keeps the tensors, the others get contiguous copies; unused ones have zero gradients."""

    @staticmethod
    def forward(ctx, devices, *tensors):
        ctx.count = len(tensors)
        return tuple(itertools.chain.from_iterable(_copies(tensors, devices)))

    @staticmethod
    def backward(ctx, *grads):
        parts = [grads[start : start + ctx.count] for start in range(0, len(grads), ctx.count)]
        return None, *(sum(part[1:], part[0]).contiguous() for part in zip(*parts, strict=True))


def _copies(tensors, devices):
    return [list(tensors), *([tensor.detach().contiguous().clone() for tensor in tensors] for _ in devices[1:])]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device, dim, *tensors):
        ctx.sizes = [len(tensor) for tensor in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *grad.split(ctx.sizes)


@pytest.fixture
def gpus(monkeypatch) -> SimpleNamespace:
    """Makes CPU four GPUs; gives the counts of tensors that are sent to them, and the types that are scattered.

    nn.DataParallel's own code runs; only copies, streams and guards are replaced.
    """
    seen = SimpleNamespace(sent=[], scattered=[])
    apply, replicate, scatter = (
        importlib.import_module(f"torch.nn.parallel.{name}") for name in ("data_parallel", "replicate", "scatter_gather")
    )

    def broadcast(tensors, devices, detach=False):
        if not tensors:
            return []
        seen.sent.append(len(tensors))
        if detach:
            return _copies(tensors, devices)
        copies = _Broadcast.apply(devices, *tensors)
        return [list(copies[start : start + len(tensors)]) for start in range(0, len(copies), len(tensors))]

    def scattered(devices, sizes, dim, tensor):
        seen.scattered.append(tensor.dtype)
        return tuple(part.clone() for part in tensor.chunk(len(devices), dim))

    init, is_enabled = nn.DataParallel.__init__, torch.is_autocast_enabled

    def on_the_cpu(self, *arguments):
        init(self, *arguments)
        self.src_device_obj = torch.device("cpu")

    monkeypatch.setattr(nn.DataParallel, "__init__", on_the_cpu)
    monkeypatch.setattr(apply, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(apply, "_check_balance", lambda ids: None)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(scatter, "Scatter", SimpleNamespace(apply=scattered))
    monkeypatch.setattr(scatter, "Gather", _Gather)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    for name in ("current_stream", "device_index"):
        monkeypatch.setattr(torch.accelerator, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device))  # else CUDA's
    return seen


@BOTH
@pytest.mark.parametrize("options", ["", "--channels-last"])
@pytest.mark.parametrize("iter_size", [1, 3])
@pytest.mark.parametrize("count, images", [(2, 5), (4, 6), (3, 1), (4, 7)])
def test_dataparallel_trains_as_one_device(gpus, monkeypatch, formulation, options, iter_size, count, images):
    trained = []
    for devices in (CPU[:1], CPU[:count]):
        run = run_of(network(formulation).double(), f"{options} --iter-size {iter_size}", devices)
        assert isinstance(run.network, nn.DataParallel) is (len(devices) > 1)
        trained.append(train(run, batches(images, 8, iter_size), 2))
        monkeypatch.setattr(layers, "are_stacked", bool)  # on several devices, as on GPUs
    assert gpus.scattered == 2 * iter_size * [torch.uint8]
    for one, other in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_replicas_compute_in_the_type_of_amp(gpus, amp, dtype):
    """Autocast is a thread's own: without care, replicas would have the device's default type."""
    model, seen = network(), []
    for index in (1, 4, -1):
        model[index].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(run_of(model, f"--amp {amp}", CPU[:2]), batches(4, 8), 1)
    assert seen == 2 * 3 * [dtype]
    validate(model, batches(4, 8), CPU[:2], f"--amp {amp}")
    assert seen == 4 * 3 * [dtype]


def test_dataparallel_validates_every_image_and_sends_the_weights_once(gpus):
    data = [*batches(1, 8), *batches(7, 8), *batches(4, 8)]
    data.append(Batch(torch.empty(0, 3, 0, 0), torch.zeros(0, dtype=torch.long), 2, []))  # none could be decoded
    one, *several = (validate(network("paper").double(), data, CPU[:count]).sums for count in (1, 2, 4))
    assert one[3:5] == [12, 2]
    for sums in several:
        assert sums == pytest.approx(one, rel=1e-12)
    assert gpus.sent == 2 * [len(list(models.layers.fold(network("paper")).parameters()))]
    assert gpus.scattered == 6 * [torch.uint8]


def test_a_part_of_one_image_is_refused_before_training(gpus, capsys):
    assert [smallest_part(*case) for case in ((7, CPU), (6, CPU), (5, CPU[:2]), (1, CPU[:3]), (8, CPU))] == [1, 2, 2, 1, 2]
    for images in range(1, 30):
        assert smallest_part(images, CPU) == len(torch.zeros(images).chunk(4)[-1])

    def build(images: int) -> nn.Module:
        args = imagenet.build_parser().parse_args([*SMALL, "--train-batch", str(images)])
        return imagenet.build_model(args, SimpleNamespace(classes=list("abcde")), CPU, None)

    with pytest.raises(BadInput, match="--arch shufflenet_v2_x0_5 --image-size 32: Expected more than 1 value per"):
        build(7)
    train(run_of(build(8), "--lr 0.01", CPU), batches(8, 32), 1)


def test_the_first_gpu_of_the_run_becomes_the_current_one(monkeypatch):
    """Or the loader's thread would pin memory by the context of GPU 0, whatever GPU was asked for."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(distributed, "check_works", lambda device: calls.append(f"{device} works"))
    devices = distributed.join(Namespace(gpu_id="2,3", sync_bn=False, compile=False))
    assert devices == [torch.device("cuda", 2), torch.device("cuda", 3)]
    assert calls == [devices[0], "cuda:2 works", "cuda:3 works"]


@pytest.mark.parametrize("action", ["ignore", "error", "once"])
def test_a_driver_that_does_not_work_is_refused(monkeypatch, capsys, action):
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\n(more)", UserWarning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(BadInput, match=r"\ACUDA doesn't work here: .*the driver is too old; mend it, [^\n]+\Z"):
            choose_devices("0")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_devices("0") == [torch.device("cpu")]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_gpu_that_can_not_be_used_is_one_line(monkeypatch, error):
    def fail(*_, device):
        raise error("CUDA error: no kernel image, or no memory\nmore lines")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    with pytest.raises(BadInput, match=r"\A--gpu-id 2: card can't be used: CUDA error: no kernel image, or no memory\Z"):
        check_works(torch.device("cuda", 2))


def test_eight_workers_for_each_gpu_at_most_one_for_each_core(monkeypatch):
    for processes, cores, gpu_id, workers in ((1, 64, "0", 8), (1, 64, "0,1,3", 24), (1, 6, "0,1", 6), (4, 64, "0", 32),
        (4, 16, "0", 16), (4, 2, "0", 4)):  # fmt: skip
        monkeypatch.setattr(distributed, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(distributed, "PROCESSES", processes)
        monkeypatch.setattr(distributed, "LOCAL_PROCESSES", processes)
        assert default_workers(gpu_id) == workers


def end_of(rank: int, device: str, fails: bool, port: int) -> None:
    """One of two processes ends as a script does; its exit status is 100 higher where the end is a usual one."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.PROCESSES, init = 2, torch.distributed.init_process_group

    def main(argv: list[str]) -> int:
        if device != "none":
            distributed.join_others(torch.device(device))
        if fails:
            raise BadInput("of this process")
        distributed.leave()
        return 0

    # A machine without a GPU has no NCCL.
    torch.distributed.init_process_group = lambda backends, **more: init(backends.split(",")[0], **more)
    try:
        commands.script(main, "script.py")
    except SystemExit as end:
        os._exit(100 + end.code)


@pytest.mark.parametrize("devices, fails, status", [(("cpu", "cuda"), False, 2), (("cuda", "cuda"), False, 100),
    (("cpu", "cpu"), True, 2), (("none", "none"), True, 102)])  # fmt: skip
def test_two_processes_and_their_ends(capfd, devices, fails, status):
    """After a failure, one that has joined the other doesn't wait for it; only all or none may have a GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=end_of, args=(rank, device, fails, port)) for rank, device in enumerate(devices)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [status, status]
    reason = "of this process" if fails else "or only some have a GPU"
    assert capfd.readouterr().err.count(reason) == (0 if status == 100 else 2)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_workers_of_a_run_on_a_gpu(images):
    args = imagenet.build_parser().parse_args(["-d", str(images), *SIZES, "--epochs", "1"])
    found = []
    for device, args.workers in (("cpu", 0), ("cuda", 1)):
        source = Data(args, torch.device(device))
        found.append([*itertools.chain.from_iterable(source.training(0)), *source.validation()])
    (worker,) = loading._workers
    assert type(worker) is multiprocessing.get_context("forkserver").Process
    assert len(found[0]) == 6
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
        assert one.images.stride() == other.images.stride()
    end_workers()
    worker.join()
    assert loading._workers == [] and not loading.has_lost_worker()


def test_pinning_keeps_a_batch(monkeypatch):
    def pin(tensor, *_):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for samples in ([Sample(torch.full((3, 4, 4), index, dtype=torch.uint8), index, []) for index in range(3)], []):
        batch = loading._collate(samples)
        pinned = pin_memory(batch, "cuda")
        assert type(pinned) is Batch and pinned[1:] == batch[1:]
        assert torch.equal(pinned.images, batch.images) and pinned.images.stride() == batch.images.stride()


@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_that_were_saved_from_a_gpu(tmp_path, monkeypatch, is_zip):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    assert load(tmp_path / "x")["state_dict"]["a"].device.type == "cpu"


class _Graph(TorchDispatchMode):
    """A pretended CUDA graph, and what captures it: notes each operation, and repeats it all in the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def pool(self) -> None:
        """It is asked for, and not used."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.calls.append((function, arguments, keywords or {}, result))
        return result

    def replay(self) -> None:
        for function, arguments, keywords, result in self.calls:
            again = function(*arguments, **keywords)
            if not function._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    old.copy_(new)


@pytest.fixture(params=["in turn", "replayed"])
def stacks(request, monkeypatch):
    """Inside stacks(), layers are excited as on a GPU: the first time as they come, then perhaps by graphs."""
    nothing = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": _Graph,
        "graph": lambda graph, **_: graph,
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
    }

    @contextlib.contextmanager
    def stacks() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(layers, "are_stacked", bool)
            patch.setattr(fused, "_scratch", lambda like: {})
            if request.param == "replayed":
                patch.setattr(stacked._Plan, "can_be_captured", lambda plan: plan.graphs is None)
                for name, fake in fakes.items():
                    patch.setattr(torch.cuda, name, fake)
            yield

    return stacks


@pytest.mark.parametrize("excitation", EXCITATIONS)
@BOTH
@LAYOUTS
def test_stacks_are_excited_as_each_layer_is(stacks, excitation, formulation, layout):
    """Twice for each step, whose gradients add up; a step whose weights lie elsewhere is another one's."""
    torch.manual_seed(0)
    settings = {"excitation": excitation, "formulation": formulation}
    shapes = [(8, 16, 3, 1), (8, 16, 3, 1), (8, 16, 3, 1), (8, 16, 1, 1), (8, 16, 3, 2), (8, 16, 3, 1), (8, 16, 3, 1)]
    model = nn.ModuleList([Conv2d(*shape[:3], groups=shape[3], **settings) for shape in shapes])
    model.append(Conv2d(8, 16, 3, standardize=False, **settings))
    model.double().to(memory_format=layout)
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    model[5].requires_grad_(False)
    *used, unused = model
    used, other = [*model[:6], model[7]], copy.deepcopy(model)
