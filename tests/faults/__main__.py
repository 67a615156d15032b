"""How much the tests notice: put one fault at a time into a copy of the project, and run the tests that belong to it.

python -m tests.faults                        all of them
python -m tests.faults utils/images/pixels.py        those of a file
python -m tests.faults --note                 write down which test noticed each
python -m tests.faults --check                only whether each can still be put in, and its test is there

The faults stand in the text files beside this one. Each begins with a line of its kind and of what it does to a user:

    == utils/images/pixels.py                        the file of the faults that follow

    silent: red and blue swap their means     training or evaluation is wrong, and nothing says so
    - MEAN = (0.485, 0.456, 0.406)            this text, which the file has once,
    + MEAN = (0.406, 0.456, 0.485)            becomes this one
    = tests/utils/images/test_pixels.py::test_norm   the test that noticed it last, which is asked first

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("silent", "loud", "same")
NEAR_MINUTES, ALL_MINUTES = 4, 20  # for the near tests and for all others; those that hang have noticed the fault

# The tests that belong to a file, those that tell soonest first; without an entry, its own and its folder's.
TESTS = {
    "imagenet.py": "test_options.py test_two_processes.py test_recipes.py test_imagenet.py test_gpu_paths.py "
    "test_resuming.py",
    "models": "models",
    "models/__init__.py": "models/test_create.py models/imagenet test_options.py test_fine_tuning.py",
    "models/excitation.py": "models/test_excitation.py models/test_loops.py models/test_layers.py models",
    "models/fused.py": "models/test_excitation.py models/test_loops.py models/test_layers.py models",
    "models/layers.py": "models/test_loops.py models/test_layers.py models/test_create.py test_gpu_paths.py models",
    "models/gpu.py": "models/test_gpu.py test_gpu_paths.py",
    "models/kernels.py": "models/test_gpu.py",
    "models/stacked.py": "models/test_gpu.py models/test_loops.py test_gpu_paths.py",
    "models/inspection.py": "models/test_inspection.py test_visualize.py",
    "utils": "utils test_options.py test_imagenet.py",
    "utils/cli/arguments.py": "utils/cli/test_options.py test_options.py test_imagenet.py",
    "utils/cli/options.py": "utils/cli/test_options.py test_options.py test_fine_tuning.py test_imagenet.py "
    "test_resuming.py",
    "utils/cli/outputs.py": "test_visualize.py test_imagenet.py",
    "utils/cli/script.py": "utils/cli/test_script.py test_two_processes.py test_gpu_paths.py test_places.py",
    "utils/compare.py": "test_study.py utils",
    "utils/prepare.py": "utils/images/test_downloads.py",
    "utils/files.py": "utils/runs/test_run_folder.py test_places.py test_resuming.py",
    "utils/images/data.py": "utils/images/test_data.py test_two_processes.py test_options.py test_gpu_paths.py "
    "test_imagenet.py",
    "utils/images/augmentation.py": "utils/images/test_augmentation.py test_two_processes.py",
    "utils/images/downloads.py": "utils/images/test_downloads.py",
    "utils/images/demo.py": "utils/images/test_demo.py test_imagenet.py test_places.py",
    "utils/images/folders.py": "utils/images/test_data.py test_options.py test_imagenet.py",
    "utils/images/pixels.py": "utils/images/test_pixels.py utils/images/test_data.py test_options.py",
    "utils/images/samples.py": "utils/images/test_data.py test_another_data_set.py test_options.py test_imagenet.py",
    "utils/images/workers.py": "utils/images/test_workers.py utils/images/test_data.py test_gpu_paths.py "
    "test_places.py test_resuming.py",
    "utils/machine/devices.py": "utils/machine/test_devices.py test_gpu_paths.py test_options.py",
    "utils/machine/distributed.py": "test_two_processes.py utils/machine/test_distributed.py test_gpu_paths.py "
    "test_options.py",
    "utils/machine/signals.py": "utils/machine/test_signals.py test_places.py test_resuming.py",
    "utils/machine/torchrun.py": "utils/machine/test_torchrun.py test_two_processes.py",
    "utils/network/forward.py": "utils/images/test_pixels.py test_options.py test_gpu_paths.py test_recipes.py",
    "utils/network/optimizers.py": "utils/network/test_optimizers.py utils/runs/test_checkpoint.py test_options.py "
    "test_resuming.py test_gpu_paths.py",
    "utils/network/parallel.py": "test_gpu_paths.py test_two_processes.py",
    "utils/network/random_state.py": "test_two_processes.py test_gpu_paths.py test_resuming.py",
    "utils/reports/logger.py": "utils/reports/test_logger.py test_study.py test_imagenet.py",
    "utils/reports/meters.py": "utils/reports/test_meters.py utils/reports/test_logger.py test_gpu_paths.py "
    "test_imagenet.py",
    "utils/reports/pictures.py": "utils/reports/test_pictures.py test_visualize.py",
    "utils/reports/predictions.py": "test_predictions.py test_two_processes.py test_imagenet.py",
    "utils/runs/checkpoint.py": "utils/runs/test_checkpoint.py test_fine_tuning.py test_gpu_paths.py test_resuming.py",
    "utils/runs/other_trainers.py": "utils/runs/test_checkpoint.py test_fine_tuning.py test_imagenet.py",
    "utils/runs/reading.py": "utils/runs/test_checkpoint.py test_gpu_paths.py",
    "utils/runs/run_folder.py": "utils/runs/test_run_folder.py test_resuming.py test_imagenet.py",
    "utils/runs/weights.py": "utils/runs/test_checkpoint.py test_fine_tuning.py test_gpu_paths.py test_imagenet.py",
    "utils/start.py": "test_places.py test_resuming.py",
}


@dataclass
class Fault:
    file: str
    kind: str
    says: str
    old: str = ""
    new: str = ""
    test: str = ""

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

    def has_its_test(self, root: Path) -> bool:
        """Whether the test that noticed it, if one is noted, is still there."""
        file, _, name = self.test.partition("::")
        return not name or ((root / file).exists() and f"def {name}(" in (root / file).read_text("utf-8"))

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
        elif head == "=":
            faults[-1].test = rest
        elif head in sides:
            sides[head].append(rest)
            faults[-1].old, faults[-1].new = "\n".join(sides["-"]), "\n".join(sides["+"])
    return faults


def write(faults: list[Fault]) -> str:
    """The text that ``read`` reads."""
    blocks, file = [], ""
    for fault in faults:
        if fault.file != file:
            blocks.append(f"== {fault.file}")
        file, lines = fault.file, [f"{fault.kind}: {fault.says}"]
        for mark, text in (("-", fault.old), ("+", fault.new), ("=", fault.test)):
            lines += [f"{mark} {line}" if line else mark for line in text.split("\n") if text]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


LISTS = {path: read(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("*.txt"))}
FAULTS = [fault for faults in LISTS.values() for fault in faults]


def copy_of_the_project(folder: Path) -> Path:
    """What git knows or could know of the working tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def near_tests(file: str, root: Path) -> list[str]:
    """The files of tests in a copy of the project that belong to a file, the nearest first."""
    tests, path = root / "tests", Path(file)
    names = TESTS.get(file) or f"{path.parent}/test_{path.name} {path.parent} {TESTS[path.parts[0]]}"
    near = [tests / name for name in names.split()]
    files = [part for path in near for part in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]
    return [str(path.relative_to(root)) for path in dict.fromkeys(files) if path.exists()]


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
    refused = [line for line in lines if line.startswith("ERROR: ")]
    # Such as the name of a test that isn't there, or is slow.
    if refused or status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"{words}: {''.join(refused[:1]) or 'no test'}")
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    unusual = f"no end in {minutes} minutes" if status == -signal.SIGALRM else f"pytest ended with status {status}"
    return (failed or [unusual])[0] if status else None


def in_a_fork(body: Callable[..., int], *arguments: object) -> int:
    """Returns its process; one of a single thread, such as a process of the pool, forks safely."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = body(*arguments)
        finally:
            os._exit(status)
    return child


def go_to_a_copy(folder: str) -> None:
    """Where a process of the pool puts its faults in."""
    os.chdir(copy_of_the_project(Path(folder) / str(os.getpid())))


def try_out(fault: Fault, is_near: bool) -> tuple[str | None, float]:
    """Put it into the copy of the project that is the current folder; the test that notices it, and the seconds."""
    begin, near = time.monotonic(), near_tests(fault.file, Path.cwd())
    with fault.put_in(Path.cwd()):
        failed = fault.test and what_fails(NEAR_MINUTES, fault.test)
        failed = failed or what_fails(NEAR_MINUTES, *near)
        if not failed and not is_near:
            failed = what_fails(ALL_MINUTES, *(f"--ignore={name}" for name in near))
    return failed, time.monotonic() - begin


def measure(faults: list[Fault], jobs: int, is_near: bool) -> None:
    """Gives each the test that notices it."""
    load_packages()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, get_context("fork"), go_to_a_copy, (folder,)) as pool,
    ):
        names = dict.fromkeys(name for fault in faults for name in near_tests(fault.file, ROOT))
        failed = pool.submit(what_fails, ALL_MINUTES, *names).result()
        if failed:
            sys.exit(f"without any fault, a test fails: {failed}")  # nothing can be measured by such tests
        for fault, (failed, seconds) in zip(faults, pool.map(partial(try_out, is_near=is_near), faults), strict=True):
            fault.test = failed or ""
            print(f"{seconds:4.0f} s  {fault.describe()}\n{'':8}{failed or 'NOBODY NOTICED'}", flush=True)


def report(faults: list[Fault]) -> None:
    """A row for each file, and the faults that nobody noticed."""
    print(f"\n{'':28}noticed  unnoticed")
    for file in [*dict.fromkeys(fault.file for fault in faults), ""]:
        noticed = [bool(fault.test) for fault in faults if file in ("", fault.file)]
        print(f"{file or 'all':28}{sum(noticed):7}{len(noticed) - sum(noticed):11}")
    for fault in faults:
        if not fault.test:
            print(f"nobody noticed: {fault.describe()}")


def note() -> None:
    """Write the tests down: those that have a name, without the values of their parameters."""
    for path, faults in LISTS.items():
        for fault in faults:
            fault.test = fault.test.partition("[")[0] if "::" in fault.test else ""
        path.write_text(write(faults), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="only its faults")
    parser.add_argument("--near", action="store_true", help="run only the tests that belong to a fault's file")
    parser.add_argument("--note", action="store_true", help="write down, in the lists, which test noticed each")
    parser.add_argument("--check", action="store_true", help="run no test")
    parser.add_argument("-n", type=int, default=os.cpu_count() or 1, metavar="N", help="faults at a time [the cores]")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.kind != "same" and (not args.files or fault.file in args.files)]
    stale = [fault for fault in faults if not fault.can_be_put_in(ROOT) or not fault.has_its_test(ROOT)]
    for fault in stale:
        print(f"it or its test doesn't go with the code any more, mend it: {fault.describe()}")
    print(f"{len(faults)} faults; {sum(fault.kind == 'silent' for fault in faults)} are silent")
    if stale or args.check:
        return bool(stale)
    measure(faults, args.n, args.near)
    report(faults)
    if args.note:
        note()
    unnoticed = [fault.kind for fault in faults if not fault.test]
    return "silent" in unnoticed or len(unnoticed) > 0.05 * len(faults)


if __name__ == "__main__":
    sys.exit(main())
