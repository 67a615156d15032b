"""What runs differently on GPUs, on a machine without one: torch's own DataParallel over pretended devices, late
reads, a loader's workers; how a run meets its devices and the other processes."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import warnings
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import imagenet
from benchmarks.gpu import batches, run_of, train
from models import layers, stacked
from models.layers import Conv2d, group_norm
from tests.helpers import EXCITED, PATIENCE, SIZES, SMALL, assert_same_run, checkpoint, infinite_gradient, started
from utils.cli.script import run_script
from utils.errors import BadInput, NotFinite
from utils.images.data import Data
from utils.images.samples import Batch
from utils.machine import distributed, torchrun
from utils.machine.devices import check_works, choose_devices, open_devices, peak_memory
from utils.machine.signals import ENDING, Stop
from utils.network.parallel import smallest_part
from utils.network.random_state import random_state, set_random_state
from utils.reports.meters import Scores
from utils.runs.checkpoint import load

CPU = [torch.device("cpu", index) for index in range(4)]  # as GPUs 0 to 3
NONE_DECODED = Batch(torch.empty(0, 3, 0, 0), torch.zeros(0, dtype=torch.long), 2, [])


def network(formulation: str = "channel") -> nn.Sequential:
    torch.manual_seed(0)
    convs = Conv2d(3, 32, 3, formulation=formulation), Conv2d(32, 32, 1, formulation=formulation)
    body = [layer for conv in convs for layer in (conv, group_norm(32), nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def validate(model: nn.Module, data: list[Batch], devices: list[torch.device], options: str = "") -> Scores:
    args = imagenet.build_parser().parse_args(options.split())
    source = SimpleNamespace(args=args, classes=[], validation=lambda: iter(data), val_batches=len(data), waited=0.0)
    return imagenet.validate(model, source, devices, Stop())


def as_on_a_gpu(monkeypatch) -> None:
    """Inside excited_once(), layers are excited together: in stacks, as the kernels' interpreter takes its time."""
    monkeypatch.setattr(layers, "is_on_gpu", lambda conv: True)
    monkeypatch.setattr(layers, "gpu_forms", lambda: (stacked,))


@pytest.mark.parametrize("options", ["", "--channels-last", "--mixup 0.5 --cutmix 1"])
@pytest.mark.parametrize("iter_size", [1, 3])
@pytest.mark.parametrize("count, images", [(2, 5), (4, 6), (3, 1), (4, 7)])
def test_dataparallel_trains_as_one_device(gpus, monkeypatch, formulation, options, iter_size, count, images):
    trained = []
    for devices in (CPU[:1], CPU[:count]):
        run = run_of(network(formulation).double(), f"{options} --iter-size {iter_size}", devices)
        assert isinstance(run.network, nn.DataParallel) is (len(devices) > 1)
        trained.append(train(run, batches(images, 8, iter_size), 2))
        as_on_a_gpu(monkeypatch)  # on several devices
    assert gpus.scattered == 2 * iter_size * [torch.float32 if "mixup" in options else torch.uint8]
    for one, other in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_replicas_compute_in_the_type_of_amp(gpus, monkeypatch, amp, dtype):
    """Autocast is a thread's own, and replicas would have the device's default; CUDA's would have norms in float32."""
    model, seen, norms, group_norm = network(), [], set(), nn.functional.group_norm

    def noted(images, groups, weight, *rest):
        norms.add((images.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return group_norm(images, groups, weight, *rest)

    monkeypatch.setattr(nn.functional, "group_norm", noted)
    for index in (1, 4, -1):
        model[index].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(run_of(model, f"--amp {amp}", CPU[:2]), batches(4, 8), 1)
    assert seen == 2 * 3 * [dtype]
    validate(model, batches(4, 8), CPU[:2], f"--amp {amp}")
    assert seen == 4 * 3 * [dtype]
    assert norms == {(dtype, dtype, False)}


def test_dataparallel_validates_every_image_and_sends_the_weights_once(gpus):
    model, data = network("paper").double(), [*batches(1, 8), *batches(7, 8), *batches(4, 8), NONE_DECODED]
    one, two, four = (validate(model, data, CPU[:count]).sums for count in (1, 2, 4))
    assert (one.images, one.bad) == (12, 2)
    assert two == pytest.approx(one, rel=1e-12) and four == pytest.approx(one, rel=1e-12)
    assert gpus.sent == 2 * [len(list(layers.fold(model).parameters()))]
    assert gpus.scattered == 6 * [torch.uint8]


def test_a_validation_has_its_seconds():
    assert validate(network(), batches(4, 8), CPU[:1]).seconds > 0


def test_the_peak_of_memory_is_that_of_the_fullest_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (5, 7, 6)[device.index])
    assert peak_memory([torch.device("cuda", index) for index in range(3)]) == 7
    assert peak_memory(CPU[:1]) == 0


def test_a_part_of_one_image_is_refused_before_training(gpus):
    cases = {(7, 4): 1, (6, 4): 2, (8, 4): 2, (5, 2): 2, (1, 3): 1}
    assert {case: smallest_part(case[0], CPU[: case[1]]) for case in cases} == cases
    args = imagenet.build_parser().parse_args([*SMALL, "--train-batch", "7"])
    with pytest.raises(BadInput, match="--arch shufflenet_v2_x0_5 --image-size 32: Expected more than 1 value per"):
        imagenet.build_model(args, SimpleNamespace(classes=list("abcde")), CPU, None)


@pytest.mark.parametrize("processes, words, kind", [
    (2, ["--sync-bn"], nn.SyncBatchNorm), (2, [], nn.BatchNorm2d), (1, ["--sync-bn"], nn.BatchNorm2d)])  # fmt: skip
def test_batchnorm_over_the_images_of_all_processes(monkeypatch, processes, words, kind):
    monkeypatch.setattr(torchrun, "PROCESSES", processes)
    args = imagenet.build_parser().parse_args([*SMALL, "--train-batch", "8", *words])
    model = imagenet.build_model(args, SimpleNamespace(classes=list("abcde"), val_size=32), CPU[:1], None)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and {type(norm) for norm in norms} == {kind}


def test_the_first_gpu_of_the_run_becomes_the_current_one(monkeypatch):
    """Or the loader's thread would pin memory by the context of GPU 0, whatever GPU was asked for."""
    calls, devices = [], [torch.device("cuda", 2), torch.device("cuda", 3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("current", device)))
    monkeypatch.setattr("utils.machine.devices.check_works", lambda device: calls.append(("works", device)))
    assert open_devices(Namespace(gpu_id="2,3", sync_bn=False, compile=False)) == devices
    assert calls == [("current", devices[0]), ("works", devices[0]), ("works", devices[1])]


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_driver_that_does_not_work_is_refused(monkeypatch, action):
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\n(more)", UserWarning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(BadInput, match=r"\ACUDA doesn't work here: .*the driver is too old; fix it, [^\n]+\Z"):
            choose_devices("0")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_devices("0") == [torch.device("cpu")]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_gpu_that_can_not_be_used_is_one_line(monkeypatch, error):
    def fail(*_, device):
        raise error("CUDA error: no kernel image\nmore lines")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    with pytest.raises(BadInput, match=r"\A--gpu-id 2: card can't be used: CUDA error: no kernel image\Z"):
        check_works(torch.device("cuda", 2))


def test_processes_wait_ten_minutes_for_each_other(monkeypatch):
    """To meet as well as later on; torch's own limits are others."""
    seen = {}

    def rendezvous(place, **words):
        seen["meeting"] = words["timeout"]
        return iter([(torch.distributed.HashStore(), 0, 1)])

    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, timeout, **__: seen.update(joined=timeout))
    monkeypatch.setattr(distributed, "check_same", lambda value: None)
    distributed.initialize(CPU[0])
    assert seen == {"meeting": timedelta(minutes=10), "joined": timedelta(minutes=10)}


def end_of(rank: int, device: str, fails: bool, port: int) -> None:
    """A process of two ends as a script does; its exit status is higher by 100 where the end is a usual one."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torchrun.PROCESSES, init = 2, torch.distributed.init_process_group

    def main(argv: list[str]) -> int:
        if device:
            distributed.initialize(torch.device(device))
        if fails:
            raise BadInput("of this process")
        distributed.leave()
        return 0

    # Without a GPU there is no NCCL.
    torch.distributed.init_process_group = lambda backends, **more: init(backends.split(",")[0], **more)
    try:
        run_script(main, "script.py")
    except SystemExit as end:
        os._exit(100 + end.code)


@pytest.mark.parametrize("devices, fails, status", [(("cpu", "cuda"), False, 2), (("cuda", "cuda"), False, 100),
    (("cpu", "cpu"), True, 2), (("", ""), True, 102)])  # fmt: skip
def test_two_processes_and_their_ends(capfd, devices, fails, status):
    """All or none have a GPU; a process that fails doesn't wait for the other that it has joined."""
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
def test_workers_of_a_run_on_a_gpu_start_clean_and_leave_signals_to_it(images):
    args = imagenet.build_parser().parse_args(["-d", str(images), *SIZES, "--epochs", "1"])
    found = []
    for device, args.workers in (("cpu", 0), ("cuda", 1)):
        source = Data(args, torch.device(device))
        found.append([*itertools.chain.from_iterable(source.training(0))])
        for worker in source.workers.processes:
            for number in ENDING:  # a terminal, or timeout, sends them to the whole process group
                os.kill(worker.pid, number)
        found[-1] += source.validation()
    (worker,) = source.workers.processes
    assert type(worker) is multiprocessing.get_context("forkserver").Process
    assert len(found[0]) == 6
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
        assert one.images.stride() == other.images.stride()
    source.workers.end()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL and not source.workers.processes


# The start of a run on a GPU, of whose processes a signal comes to all; then the main process is killed.
KILLED = """
import os, signal, sys, time, torch, imagenet
from multiprocessing import forkserver
from utils.images.data import Data
data = Data(imagenet.build_parser().parse_args(sys.argv[1:]), torch.device("cuda"))
steps = data.training(0)
next(next(steps))
server = forkserver._forkserver._forkserver_pid
os.kill(server, signal.SIGTERM)
time.sleep(0.2)
print("left:", os.waitpid(server, os.WNOHANG), data.workers.processes[0].exitcode, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_of_a_run_on_a_gpu_outlive_a_signal_and_end_with_the_main_process(images):
    with started("-d", images, *SIZES, "-j", 1, "--epochs", 1, program=("-W", "ignore", "-c", KILLED)) as process:
        assert "left: (0, 0) None\n" in process.stdout
        process.communicate(timeout=PATIENCE)  # returns once no process has the pipes


def test_the_random_states_of_all_gpus_are_saved_and_those_that_are_here_restored(monkeypatch):
    """Dropout on a GPU draws from it; a run of four GPUs may go on with two."""
    states = [torch.full((16,), index, dtype=torch.uint8) for index in range(4)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    torch.manual_seed(3)
    saved = random_state()
    drawn = torch.rand(3)
    assert saved["cuda"] == states
    restored = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state}))
    set_random_state(saved)
    assert torch.equal(torch.rand(3), drawn)
    assert restored == {0: states[0], 1: states[1]}


@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_that_were_saved_from_a_gpu(tmp_path, monkeypatch, is_zip):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    assert load(tmp_path / "x")["state_dict"]["a"].device.type == "cpu"


@pytest.mark.parametrize(
    "options, size",
    [
        ("", 1),
        ("--amp bf16 --iter-size 3", 3),
        ("--amp fp16 --iter-size 3", 3),
        ("--mixup 1", 1),
        ("--cutmix 1 --bce", 1),
    ],
)
def test_a_step_on_another_device_waits_for_no_number(monkeypatch, formulation, options, size):
    """The meta device stands for a GPU: no number can be read from it, but for what a step measured."""
    meta, read, autocast = torch.device("meta"), [], torch.autocast

    def off_meta(device, *arguments, **keywords):
        return contextlib.nullcontext() if device == "meta" else autocast(device, *arguments, **keywords)

    def transfer(values):
        read.append(values.device)
        return SimpleNamespace(wait=lambda: [1.0] * 8 + [0.0])

    monkeypatch.setattr(torch, "autocast", off_meta)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(imagenet, "Transfer", transfer)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: None)  # the fused one knows no meta device
    run = run_of(network(formulation), options, [meta])
    train(run, batches(2, 8, size), 2)
    assert read == [meta, meta]


@contextlib.contextmanager
def late() -> Iterator[list[list[str]]]:
    """Tensors say that they are on a GPU: what a step measured is read one step later. Gives the calls of its event."""
    events = []

    def event() -> SimpleNamespace:
        events.append(calls := [])
        return SimpleNamespace(record=lambda: calls.append("record"), synchronize=lambda: calls.append("wait"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "Event", event)
        patch.setattr(layers, "is_on_gpu", lambda conv: False)  # to compare bit for bit
        yield events


def state(run: imagenet.Run) -> list[torch.Tensor]:
    """Copies of the weights and of the momentum."""
    parameters = run.optimizer.param_groups[0]["params"]
    momenta = [run.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    return [tensor.detach().clone() for tensor in (*parameters, *momenta)]


def test_late_reads_skip_the_same_steps():
    """In fp16, at a scale that overflows at first and grows until it does again; a skipped step changes nothing."""
    ended = []
    for around in (contextlib.nullcontext, late):
        run, skipped = run_of(network(), "--amp fp16", CPU[:1]), []
        run.data = SimpleNamespace(classes=[], digests={"train": "", "val": ""})
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)
        assert not any(momentum.any() for momentum in state(run)[-len(list(run.model.parameters())) :])
        with around() as events:
            for step, batch in enumerate(batches(4, 8, 12)):
                before, scale = state(run), run.scaler.get_scale()
                imagenet.train_step(run, iter([batch]), Stop())
                skipped.append(run.scaler.get_scale() < scale)
                assert all(map(torch.equal, before, state(run))) is skipped[-1]
                if around is late:
                    assert events == [*step * [["record", "wait"]], ["record"]]
                    assert run.scores.images == 4 * step
                if step == 6:
                    sums = run.checkpoint()["sums"]
                    assert (sums[3], sums[5]) == (4 * 7, sum(skipped))
        assert skipped[0] and True in skipped[skipped.index(False) :]
        run.collect()
        assert run.scores.skipped_steps == sum(skipped)
        ended.append((state(run), sums, run.scores.sums))
    assert all(map(torch.equal, ended[0][0], ended[1][0]))
    assert ended[0][1:] == ended[1][1:]


def nan(logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


@pytest.mark.parametrize("amp, change", [("off", infinite_gradient), ("off", nan), ("fp16", nan)])
def test_a_step_that_is_not_finite_names_itself(amp, change):
    """Whether its gradients are not or its loss; neither it nor the step after it touches weights and momentum."""
    run, states = run_of(network(), f"--amp {amp}", CPU[:1]), []

    def damage(module, inputs, logits):
        states.append(state(run))
        return change(logits) if len(states) == 3 else logits

    run.model.register_forward_hook(damage)
    with late(), pytest.raises(NotFinite, match="Epoch 1/90, step 3, learning rate"):
        train(run, batches(4, 8), 6)
    assert len(states) == 4
    assert all(map(torch.equal, states[2], state(run)))
    assert not any(map(torch.equal, states[1], states[2]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads late by itself")
def test_a_whole_run_with_late_reads(command, finished, images, tmp_path, stop_after):
    """A signal is answered a step later, and the run that goes on is that of reads at once."""
    with late():
        stop_after(1)
        assert command(*EXCITED, "-d", images, "--epochs", 2, "-c", tmp_path / "run").status == 143
        saved = checkpoint(tmp_path / "run")
        assert (saved["epoch"], saved["step"], saved["sums"][3]) == (0, 2, 8)
        assert command("--resume", tmp_path / "run").status == 0
    assert_same_run(finished, tmp_path / "run")
