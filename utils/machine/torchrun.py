"""What torchrun tells a process by the environment, and the command that starts the run again."""

import os
import shlex
import sys
from pathlib import Path

from utils.errors import BadInput
from utils.words import shortest


def _number(name: str, default: int) -> int:
    """A number from the environment, or the default: other launchers set texts such as 2(x2)."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


# As torchrun sets them; without it, there is one process.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
PROCESSES = max(_number("WORLD_SIZE", 1), 1)
RANK, LOCAL_RANK, LOCAL_PROCESSES = (
    _number(name, value) if PROCESSES > 1 else value
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)
RESTARTS = _number("TORCHELASTIC_RESTART_COUNT", 0)  # by torchrun's --max-restarts
PARENT = os.getppid()


def is_orphan() -> bool:
    """Whether torchrun, which started this process, is gone."""
    return UNDER_TORCHRUN and os.getppid() != PARENT


def check_environment() -> None:
    """Check that the environment says how several processes find each other.

    Raises:
        BadInput: WORLD_SIZE is set without what they need.
    """
    usable = {
        "RANK": 0 <= _number("RANK", -1) < PROCESSES,
        "MASTER_ADDR": "MASTER_ADDR" in os.environ,
        "MASTER_PORT": _number("MASTER_PORT", 0) > 0,
    }
    for name, is_usable in usable.items():
        if not is_usable:
            text = f"WORLD_SIZE is {PROCESSES} in the environment, without a usable {name}"
            raise BadInput(f"{text}: start by torchrun, or unset WORLD_SIZE")


def shell_command(words: list[str]) -> str:
    """A command of this script to paste, by this interpreter or its torchrun, as short as they can be named."""
    python = Path(sys.executable)
    start = [shortest(python)]
    if UNDER_TORCHRUN:
        machines = PROCESSES // LOCAL_PROCESSES
        several = ["--nnodes", str(machines)] if machines > 1 else []
        start = [shortest(python.with_name("torchrun")), *several, "--nproc-per-node", str(LOCAL_PROCESSES)]
    return shlex.join([*start, sys.argv[0], *words])
