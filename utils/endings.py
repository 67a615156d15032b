"""How a command ends that an exception ends: its exit status and its one line."""

import torch

from utils.distributed import ToldByAnother, is_lost
from utils.errors import BadInput, RunFailed


def explain(error: Exception) -> tuple[int, str]:
    """The exit status of a failure, and its one line; one that nobody expects is raised again."""
    if isinstance(error, BadInput):
        return 2, str(error)
    if isinstance(error, RunFailed | OSError | ToldByAnother):
        # Of an error in a process that loads images, the last line is the error and those before it its traceback.
        return 1, (str(error).splitlines() or [type(error).__name__])[-1]
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        text = f"out of memory: lower --train-batch and raise --iter-size by as much, or lower --image-size: {error}"
        return 1, text.splitlines()[0]
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        # Raised wherever the main process is when one of the loader's dies.
        return 1, "a process that loads images died; out of memory? Lower --workers"
    if isinstance(error, RuntimeError) and is_lost(error):
        return 1, "another process of the run has ended; go on with all of them by --resume if there is a checkpoint"
    raise error
