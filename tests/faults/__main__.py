"""How much the tests notice: put one fault at a time into a copy of the project, and run the tests that belong to it.

python -m tests.faults                        all of them, in some hours on two cores
python -m tests.faults utils/images.py        those of a file
python -m tests.faults --check                only whether each can still be put in

The faults stand in the text files beside this one. Each begins with a line of its kind and of what it does to a user:

    == utils/images.py                        the file of the faults that follow

    silent: red and blue swap their means     training or evaluation is wrong, and nothing says so
    - MEAN = (0.485, 0.456, 0.406)            this text, which the file has once,
    + MEAN = (0.406, 0.456, 0.485)            becomes this one

``loud`` is a crash, a wrong message, or something lost. ``same`` changes nothing that a user could see, for the reason
that its line gives; it isn't put in, and tells the next reader not to try.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("silent", "loud", "same")
NEAR_MINUTES, ALL_MINUTES = 4, 20  # for the near tests and for all others; those that hang have noticed the fault
NOTICED, UNNOTICED = 10, 11  # exit statuses of a fault's process

# The tests that belong to a file, those that tell soonest first; without an entry, its own and its folder's.
TESTS = {
    "imagenet.py": "test_options.py test_two_processes.py test_recipes.py test_imagenet.py test_gpu_paths.py "
    "test_resuming.py",
    "models/": "models",
    "models/__init__.py": "models/test_create.py models/imagenet test_options.py test_fine_tuning.py",
    "models/excitation.py": "models/test_excitation.py models/test_loops.py models/test_layers.py models",
    "models/fused.py": "models/test_excitation.py models/test_loops.py models/test_layers.py models",
    "models/layers.py": "models/test_loops.py models/test_layers.py models/test_create.py test_gpu_paths.py models",
    "models/gpu.py": "models/test_gpu.py test_gpu_paths.py",
    "models/kernels.py": "models/test_gpu.py",
    "models/stacked.py": "models/test_gpu.py models/test_loops.py test_gpu_paths.py",
    "models/inspection.py": "models/test_inspection.py test_visualize.py",
    "models/imagenet/": "models/imagenet models/test_create.py test_options.py",
    "utils/": "utils test_options.py test_imagenet.py",
    "utils/arguments.py": "utils/test_options.py test_options.py test_imagenet.py",
    "utils/checkpoint.py": "utils/test_checkpoint.py test_fine_tuning.py test_gpu_paths.py test_resuming.py",
    "utils/classifier.py": "utils/test_images.py test_options.py test_gpu_paths.py test_recipes.py",
    "utils/command.py": "utils/test_command.py test_two_processes.py test_gpu_paths.py test_places.py",
    "utils/compare.py": "test_study.py utils",
    "utils/data.py": "utils/test_data.py test_two_processes.py test_options.py test_gpu_paths.py test_imagenet.py",
    "utils/demo.py": "utils/test_demo.py test_imagenet.py test_places.py",
    "utils/distributed.py": "test_two_processes.py utils/test_distributed.py test_gpu_paths.py test_options.py",
    "utils/files.py": "utils/test_run_folder.py test_places.py test_resuming.py",
    "utils/folders.py": "utils/test_data.py test_options.py test_imagenet.py",
    "utils/images.py": "utils/test_images.py utils/test_data.py test_options.py",
    "utils/logger.py": "utils/test_logger.py test_study.py test_imagenet.py",
    "utils/meters.py": "utils/test_meters.py utils/test_logger.py test_gpu_paths.py test_imagenet.py",
    "utils/options.py": "utils/test_options.py test_options.py test_fine_tuning.py test_imagenet.py test_resuming.py",
    "utils/outputs.py": "test_visualize.py test_imagenet.py",
    "utils/pictures.py": "utils/test_pictures.py test_visualize.py",
    "utils/predictions.py": "test_predictions.py test_two_processes.py test_imagenet.py",
    "utils/reading.py": "utils/test_checkpoint.py test_gpu_paths.py",
    "utils/run_folder.py": "utils/test_run_folder.py test_resuming.py test_imagenet.py",
    "utils/signals.py": "utils/test_signals.py test_places.py test_resuming.py",
    "utils/start.py": "test_places.py test_resuming.py",
    "utils/workers.py": "utils/test_workers.py utils/test_data.py test_gpu_paths.py test_places.py test_resuming.py",
}


@dataclass
class Fault:
    file: str
    kind: str
    says: str
    old: str = ""
    new: str = ""

    def describe(self) -> str:
        return f"{self.file}: {self.kind}: {self.says}"

    def changed(self, root: Path) -> str:
        return (root / self.file).read_text("utf-8").replace(self.old, self.new, 1)

    def can_be_put_in(self, root: Path) -> bool:
        """Whether the file has the old text once, and is Python with the new one."""
        if (root / self.file).read_text("utf-8").count(self.old) != 1 or self.old == self.new:
            return False
        try:
            compile(self.changed(root), self.file, "exec")
        except SyntaxError:
            return False
        return True

    @contextlib.contextmanager
    def put_in(self, root: Path) -> Iterator[None]:
        source = (root / self.file).read_text("utf-8")
        (root / self.file).write_text(self.changed(root), "utf-8")
        yield
        (root / self.file).write_text(source, "utf-8")


def read(text: str) -> list[Fault]:
    """The faults of a text file, as the top of this file describes them."""
    faults, file, sides = [], "", {}
    for line in [*text.splitlines(), ""]:
        head, _, rest = line.partition(" ")
        if head == "==":
            file = rest
        elif head.rstrip(":") in KINDS and head.endswith(":"):
            faults.append(Fault(file, head[:-1], rest))
            sides = {"-": [], "+": []}
        elif head in sides:
            sides[head].append(rest)
            faults[-1].old, faults[-1].new = "\n".join(sides["-"]), "\n".join(sides["+"])
    return faults


FAULTS = [fault for file in sorted(Path(__file__).parent.glob("*.txt")) for fault in read(file.read_text("utf-8"))]


def copy_of_the_project(folder: Path) -> Path:
    """What git knows or could know of the working tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def near_tests(file: str) -> list[str]:
    """The files of tests that belong to a file, the nearest first."""
    tests, place = ROOT / "tests", f"{Path(file).parent}/"
    near = [tests / name for name in (TESTS.get(file) or f"{place}test_{Path(file).name} {TESTS[place]}").split()]
    files = [part for path in near for part in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(files) if path.exists()]


def load_packages() -> None:
    """What tests import takes seconds: it is imported once, for all that is forked from here."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # stale bytecode hides a fault: it knows a file's size and second
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as conftest.py does
    import matplotlib.figure  # noqa: F401
    import torchvision  # noqa: F401


def run_pytest(minutes: int, log: int, *words: str) -> int:
    """In this process and folder, which ends after so many minutes; prints to the file ``log``."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    signal.alarm(60 * minutes)
    sys.path[0] = str(Path.cwd())
    for name in [name for name in sys.modules if name.partition(".")[0] in ("__main__", "tests")]:
        del sys.modules[name]  # those of the project itself, which is elsewhere
    sys.modules["__main__"] = ModuleType("__main__")
    return pytest.main(["-x", "-p", "no:cacheprovider", *words])


def what_fails(minutes: int, *words: str) -> str | None:
    """The first test that fails of those that pytest is told to run here; None if all pass."""
    with tempfile.TemporaryFile() as log:
        child = in_a_fork(run_pytest, minutes, log.fileno(), *words)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    unusual = f"no end in {minutes} minutes" if status == -signal.SIGALRM else f"pytest ended with status {status}"
    return (failed or [unusual])[0] if status else None


def try_out(fault: Fault, root: Path, is_near: bool) -> int:
    """Put it into a copy of the project, and print two lines; in a process of its own, whose exit status this gives."""
    os.chdir(root)
    begin, own = time.monotonic(), near_tests(fault.file)
    with fault.put_in(root):
        failed = what_fails(NEAR_MINUTES, *own)
        if not failed and not is_near:
            failed = what_fails(ALL_MINUTES, *(f"--ignore={name}" for name in own))
    print(f"{time.monotonic() - begin:4.0f} s  {fault.describe()}\n{'':8}{failed or 'NOBODY NOTICED'}", flush=True)
    return NOTICED if failed else UNNOTICED


def check_tests(faults: list[Fault], root: Path) -> int:
    """Nothing can be measured by tests that fail without a fault."""
    os.chdir(root)
    failed = what_fails(ALL_MINUTES, *dict.fromkeys(name for fault in faults for name in near_tests(fault.file)))
    if failed:
        print(f"without any fault, a test fails: {failed}", flush=True)
    return int(failed is not None)


def in_a_fork(body: Callable[..., int], *arguments: object) -> int:
    """Returns its process; one that runs a single thread, as this one does, forks safely."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = body(*arguments)
        finally:
            os._exit(status)
    return child


def measure(faults: list[Fault], jobs: int, is_near: bool) -> list[Fault]:
    """Those that no test notices."""
    load_packages()
    unnoticed, running = [], {}
    with tempfile.TemporaryDirectory() as folder:
        free = [copy_of_the_project(Path(folder) / str(job)) for job in range(jobs)]
        if os.waitpid(in_a_fork(check_tests, faults, free[0]), 0)[1]:
            sys.exit(1)

        def wait_for_one() -> None:
            child, status = os.wait()
            fault, root = running.pop(child)
            free.append(root)
            if os.waitstatus_to_exitcode(status) not in (NOTICED, UNNOTICED):
                sys.exit(f"can't try out {fault.describe()}")
            if os.waitstatus_to_exitcode(status) == UNNOTICED:
                unnoticed.append(fault)

        for fault in faults:
            if not free:
                wait_for_one()
            root = free.pop()
            running[in_a_fork(try_out, fault, root, is_near)] = fault, root
        while running:
            wait_for_one()
    return unnoticed


def report(faults: list[Fault], unnoticed: list[Fault]) -> None:
    """A row for each file, and the faults that nobody noticed."""
    print(f"\n{'':28}noticed  unnoticed")
    for file in [*dict.fromkeys(fault.file for fault in faults), ""]:
        of_file = [fault for fault in faults if file in ("", fault.file)]
        missed = sum(fault in unnoticed for fault in of_file)
        print(f"{file or 'all':28}{len(of_file) - missed:7}{missed:11}")
    for fault in unnoticed:
        print(f"nobody noticed: {fault.describe()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="only its faults")
    parser.add_argument("--near", action="store_true", help="run only the tests that belong to a fault's file")
    parser.add_argument("--check", action="store_true", help="run no test")
    parser.add_argument("-n", type=int, default=os.cpu_count() or 1, metavar="N", help="faults at a time [the cores]")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.kind != "same" and (not args.files or fault.file in args.files)]
    stale = [fault for fault in faults if not fault.can_be_put_in(ROOT)]
    for fault in stale:
        print(f"can't be put in, mend it: {fault.describe()}")
    print(f"{len(faults)} faults; {sum(fault.kind == 'silent' for fault in faults)} are silent")
    if stale or args.check:
        return bool(stale)
    unnoticed = measure(faults, args.n, args.near)
    report(faults, unnoticed)
    return any(fault.kind == "silent" for fault in unnoticed) or len(unnoticed) > 0.05 * len(faults)


if __name__ == "__main__":
    sys.exit(main())
