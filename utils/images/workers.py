"""The processes that load images: what they make of samples, how they begin, fail and end."""

import argparse
import copy
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import RunFailed
from utils.images.pixels import ignore_warnings
from utils.images.samples import Batch, Sample, Samples, collate
from utils.machine import torchrun
from utils.machine.signals import held, ignore_in_worker, may_handle

PREFETCHED = 2  # batches of a worker

Key = tuple[str, int, int]  # of a sample: TRAIN or VAL, epoch, index


class Splits(Dataset):
    """Both splits behind one kind of key, so that the same workers serve training and validation."""

    def __init__(self, splits: dict[str, Samples]):
        self.splits = splits

    def __getitem__(self, key: Key) -> Sample:
        split, *rest = key
        return self.splits[split][tuple(rest)]


def start_worker(worker: int) -> None:
    """Workers end with the main process, without a word."""
    sys.excepthook = lambda *error: None  # the main process may die while it sends
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_error
    ignore_in_worker()
    ignore_warnings()
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _hand_over_error(queue: multiprocessing.queues.Queue, error: Exception, item: tuple[int, Batch]) -> None:
    """Send the reason in place of a batch that can't be sent: multiprocessing only prints it, and the run would wait.

    Memory to share is scarce in containers, and the name of a socket may be too long.
    """
    number, _ = item
    failure = (
        f"a process that loads images can't hand over a batch ({type(error).__name__}: {error}): a container may need "
        "more shared memory by --shm-size or --ipc=host, TMPDIR a shorter path, ulimit -n a larger number; -j 0 goes "
        "without"
    )
    queue.put((number, Batch(None, [], 0, [], failure)))


def _end_with_main_process() -> None:
    """PyTorch watches only who started the worker, which may be the fork server."""
    multiprocessing.parent_process().join()
    os._exit(1)


class Workers:
    """The processes that load a run's images. Inside ``with``, they end with it, however it ends.

    Args:
        count: how many; with 0 this process loads them itself.
        is_gpu: whether their batches are for a GPU.

    Raises:
        RunFailed: one can't be started; or, from ``with``, one has died.
    """

    def __init__(self, count: int, is_gpu: bool):
        self.count, self.is_gpu = count, is_gpu
        self.processes: list[multiprocessing.Process] = []

    def load(self, splits: dict[str, Samples], batches: Iterable[list[Key]]) -> Iterator[Batch]:
        """Start them; their batches, each of the samples that the keys name, in this order."""
        ignore_warnings()
        loader = DataLoader(
            Splits(splits),
            batch_sampler=batches,
            num_workers=self.count,
            prefetch_factor=PREFETCHED if self.count else None,
            multiprocessing_context=self._context() if self.count else None,
            collate_fn=collate,
            pin_memory=self.is_gpu,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # otherwise each pass draws a number from the global one
        )
        try:
            with held():
                return iter(loader)
        except (OSError, RuntimeError) as error:
            raise RunFailed(
                f"can't start {self.count} processes that load images ({error}): lower --workers, or raise the limits "
                "of processes and open files"
            ) from error

    def warn_of_shared_memory(self, args: argparse.Namespace, val_size: int) -> None:
        """Warn if the batches that they prefetch, on the whole machine, may not fit into shared memory.

        Args:
            val_size: pixels of a validation image's side.
        """
        if not os.path.isdir("/dev/shm"):
            return
        status = os.statvfs("/dev/shm")
        free, workers = status.f_bavail * status.f_frsize, self.count * torchrun.LOCAL_PROCESSES
        train = 0 if args.evaluate else args.train_batch * args.image_size**2
        val = args.test_batch * val_size**2
        needed = workers * PREFETCHED * max(train, val) / torchrun.PROCESSES * 3
        if needed > free:
            print(
                f"/dev/shm has {free / 2**20:.0f} MiB free, and batches for {workers} workers may take "
                f"{needed / 2**20:.0f}: give a container more by --shm-size or --ipc=host, or lower --workers"
            )

    def _context(self) -> multiprocessing.context.BaseContext:
        """By which the loader starts processes, and this object knows them."""
        # A forked worker would inherit locks of CUDA's and NCCL's threads, which nobody releases.
        usual = multiprocessing.get_context("forkserver" if self.is_gpu else None)
        if usual.get_start_method() == "forkserver":
            with held():  # a block of its own, as starting the tracker unblocks signals
                multiprocessing.resource_tracker.ensure_running()

        def make(*args, **keywords) -> multiprocessing.Process:
            self.processes.append(usual.Process(*args, **keywords))
            return self.processes[-1]

        context = copy.copy(usual)
        context.Process = make
        return context

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # Torch raises the first wherever the main process is at that moment; the others are of a broken connection.
        has_lost_one = isinstance(error, RuntimeError | OSError | EOFError) and self._has_lost_one()
        self.end()  # before the loader is freed, which would wait for them
        if has_lost_one:
            raise RunFailed(
                "a process that loads images died: if memory ran out, lower --workers; if shared memory did, as in a "
                "container, raise it by --shm-size or --ipc=host"
            ) from error

    def _has_lost_one(self) -> bool:
        """Whether one has died."""
        _ignore_deaths()
        started = self._started()
        if started:  # the connection to a process may break a moment before the process counts as dead
            multiprocessing.connection.wait([worker.sentinel for worker in started], timeout=1)
        return any(worker.exitcode for worker in started)

    def end(self) -> None:
        """Kill them: at its exit Python would end them by a signal that they ignore, and wait."""
        _ignore_deaths()
        for worker in self._started():
            worker.kill()
        self.processes.clear()

    def _started(self) -> list[multiprocessing.Process]:
        return [worker for worker in self.processes if worker.pid is not None]


def _ignore_deaths() -> None:
    """Remove the loader's SIGCHLD handler, which would raise wherever the main process is."""
    if may_handle("SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
