"""Reading a file of weights, of whatever trainer and age, without running any of its code.

torch.load(weights_only=True) refuses a file that names a class it doesn't know, though the class is most often that of
a setting beside the weights. Here a stand-in takes the place of each such class, so that the weights can be read.
"""

import json
import pickle
import re
import shlex
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from utils.errors import BadInput
from utils.words import shortest

MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # begins a file of torch before 1.6
LOAD = "torch.load({}, 'cpu', weights_only=False)"
MOST_CLASSES = 100  # that a file may name


class NotWhole(BadInput):
    """A checkpoint is damaged or missing; the one before it may do."""


class Opaque:
    """Stands for an object of a class that a file names, here ``name``. It takes what the file says, and does nothing.

    Each class has a subclass of this one: torch makes objects by it, and calls no function of the file.
    """

    name = ""

    def __new__(cls, *arguments: object):
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class NumpyType:
    """Stands for a NumPy dtype, whose own way to take a state trusts it."""

    def __init__(self, code: str, *flags: bool):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def numpy_scalar(kind: NumpyType, data: bytes = b"") -> object:
    """The number that a NumPy scalar holds."""
    code = kind.order + kind.code
    is_number = re.fullmatch(r"[<>|=]?([fiu][248]|[iu]1|b1)", code)
    return np.frombuffer(data, code)[0].item() if is_number else data


STAND_INS = [
    (NumpyType, "numpy.dtype"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),  # before NumPy 2
    (lambda *arguments: {}, "collections.defaultdict"),  # torch fills none but plain dicts
]
# What takes the model out of a dict, where the file doesn't tell its keys.
ANY_MODEL = (
    "; model = next(m for m in (model.values() if isinstance(model, dict) else [model])"
    " if isinstance(m, torch.nn.Module))"
)


def read_file(file: Path) -> object:
    """What a file of torch.save or of safetensors holds, on the CPU.

    Objects of classes that torch doesn't read safely are :class:`Opaque`; NumPy's scalars are plain numbers.

    Raises:
        BadInput: it can't be read, or is something else, and the message says what; NotWhole where that is damage.
    """
    try:
        if not file.is_file():
            raise NotWhole(f"there is no checkpoint {file}")
        with file.open("rb") as stream:
            start = stream.read(64)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:
            return _read_safetensors(file)
        _check(file, start)
        return _load(file)
    except OSError as error:
        raise BadInput(f"can't read {file}: {error.strerror}") from error


def damaged(file: Path | str, reason: str) -> NotWhole:
    """What to raise for a file that isn't what was written."""
    return NotWhole(f"{file} is damaged: {reason}; give another file")


def needs_code(file: Path, name: str, keys: str = "", load: str = LOAD) -> BadInput:
    """What to raise for a file whose weights are inside of an object, with the command that takes them out.

    Args:
        name: of the object's class.
        keys: what follows in Python, to come from the file's dict to the object.
        load: what reads the file.
    """
    names = [json.dumps(text) for text in (str(file), f"{file.stem}-weights.pth")]
    python = f"import torch; model = {load.format(names[0])}{keys}; torch.save(model.state_dict(), {names[1]})"
    return BadInput(
        f"{file} needs the code of {name}, which is never run here; if you trust the file, this runs it and keeps the "
        f"weights: {shlex.join([shortest(Path(sys.executable)), '-c', python])}"
    )


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise BadInput(f"{file} needs the package safetensors: pip install it, or give another file") from error
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise damaged(file, str(error)) from error


def _check(file: Path, start: bytes) -> None:
    """See that a file is of torch.save and, as far as it has checksums, whole."""
    try:
        is_zip = zipfile.is_zipfile(file)  # torch before 1.6 wrote something else, without checksums
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                is_whole = archive.testzip() is None
                names = {name.rpartition("/")[2] for name in archive.namelist()}
                # torch takes a member with a folder's attribute for a folder, and leaves its tensor's memory unset.
                has_folders = any(part.external_attr for part in archive.infolist())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, RuntimeError, EOFError) as error:
        raise damaged(file, str(error)) from error
    if not is_zip:
        if start.startswith(b"PK\3\4") or not start.strip(b"\0"):  # a torn write leaves zeros
            raise damaged(file, "it is empty or cut short")
        if MAGIC not in start:
            raise BadInput(f"{file} is no checkpoint of PyTorch, as it begins with {start[:16]!r}: give another file")
        return
    if is_whole and "constants.pkl" in names:
        raise needs_code(file, "a TorchScript archive", load="torch.jit.load({}, 'cpu')")
    if is_whole and "data.pkl" not in names:
        raise BadInput(f"{file} is no checkpoint of PyTorch, but another kind of zip archive: give another file")
    if not is_whole or has_folders:
        raise damaged(file, "a checksum is wrong")


def _load(file: Path) -> object:
    """torch.load, with a stand-in for each class that torch says it doesn't know.

    torch.serialization.get_unsafe_globals_in_checkpoint() would name them all, but of no file of torch before 1.6.
    """
    names = {}
    while len(names) < MOST_CLASSES:
        try:
            with torch.serialization.safe_globals([*STAND_INS, *names.values()]), file.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # of a damaged pickle, torch.load raises nearly every type there is
            # Only torch's text has the name. Without one, the file is refused all the same.
            found = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+) ", str(error))
            if not found and not names:
                raise damaged(file, "torch.load can't read it safely") from error
            if not found:  # before torch 1.6, a model had its source with it, for which there is no stand-in
                raise needs_code(file, next(iter(names)), ANY_MODEL) from error
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            if name in names:  # nor does torch take one for functions of the system
                raise needs_code(file, name) from error
            names[name] = (type("Opaque", (Opaque,), {"name": name}), name)
    raise needs_code(file, f"{next(iter(names))} and {len(names) - 1} others")


def is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which is an int


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds numbers, with neither nan nor infinity among them."""
    if not tensor.is_cpu or tensor.layout != torch.strided:
        return False
    # A view can give one number any shape.
    stands_for_itself = tensor.nbytes <= tensor.untyped_storage().nbytes()
    try:
        return stands_for_itself and bool(tensor.isfinite().all())
    except NotImplementedError:  # of a type that isn't for computing, such as a quantized one
        return False


def are_finite(state: object) -> bool:
    """Whether an optimizer's state has finite tensors, by parameter and name, and nothing else."""
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        return False
    values = [value for entry in state.values() for value in entry.values()]
    return all(isinstance(value, torch.Tensor) and is_finite(value) for value in values)
