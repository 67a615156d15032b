"""torch's global random numbers, from which dropout draws; data has generators of its own."""

import contextlib
from collections.abc import Iterator

import torch

from utils.machine import torchrun
from utils.machine.signals import Stopped


def seed_dropout(seed: int, epoch: int, step: int) -> None:
    """Give all processes but the first a dropout of their own, which is the same again after resuming."""
    if torchrun.RANK > 0:
        torch.manual_seed(hash((seed, epoch, step, torchrun.RANK)))


def random_state() -> dict:
    """The states of torch's global random generators, which dropout draws from; data has generators of its own."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """Go on from a :func:`random_state`, on the GPUs that are there."""
    torch.set_rng_state(state["cpu"])
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)


@contextlib.contextmanager
def undone_if_stopped(model: torch.nn.Module, micro_batches: int) -> Iterator[None]:
    """If a signal ends the run in the middle of a step, restore random state and buffers as they were before it."""
    if micro_batches == 1 or torchrun.PROCESSES > 1:  # no signal can end the middle of such a step
        yield
        return
    state, buffers = random_state(), [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    except Stopped:
        set_random_state(state)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        raise
