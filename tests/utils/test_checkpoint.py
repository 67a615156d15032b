"""Checkpoints that load as they were written, or are refused in one line."""

import copy
import os
import random
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import tiny_checkpoint
from utils import checkpoint
from utils.checkpoint import load, serialize, versions
from utils.errors import BadInput, RunFailed


def test_bare_weights_and_a_file_of_an_old_torch(tmp_path):
    state = nn.Linear(2, 3).state_dict()
    prefixed = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    for contents, epoch in ((state, 0), (prefixed, 3)):
        torch.save(contents, tmp_path / "file", _use_new_zipfile_serialization=contents is state)
        saved = load(tmp_path / "file")
        assert saved.keys() == {*tiny_checkpoint(), "versions", "missing", "file"}
        assert (saved["epoch"], saved["optimizer"], "optimizer" in saved["missing"]) == (epoch, {"state": {}}, True)
        assert equal(saved["state_dict"], dict(state))


UNFIT = [({}, "lacks bias"), ({"bias": torch.zeros(3), "more": torch.zeros(1)}, "has more"),
    ({"bias": torch.zeros(4)}, r"bias as \[4\] .*, and the network \[3\]"),
    ({"bias": torch.zeros(3).double()}, r"bias as .*float64, and the network .*float32")]  # fmt: skip


@pytest.mark.parametrize("bias, text", UNFIT)
def test_weights_that_do_not_fit(bias, text, tmp_path):
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(BadInput, match=text):
        checkpoint.load_weights(model, {"state_dict": {"weight": torch.zeros(3, 2), **bias}, "file": tmp_path})
    assert torch.equal(model.weight, before)


def restore(file: Path) -> dict:
    """All that a run takes from a checkpoint of the linear layer."""
    saved = load(file)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    checkpoint.load_weights(model, saved)
    checkpoint.load_optimizer(optimizer, saved)
    checkpoint.load_random_state(torch.amp.GradScaler("cpu", enabled=False), saved)
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return saved | {"state_dict": dict(model.state_dict()), "optimizer": momenta, "file": ""}


def equal(one: object, other: object) -> bool:
    """Of nested dicts and lists: the same types, and the same values to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def refused_or_equal(data: bytes, file: Path, whole: dict) -> bool:
    """Whether it is refused, in one line that names the file; otherwise it must be the whole."""
    file.write_bytes(data)
    try:
        found = restore(file)
    except BadInput as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
        return True
    assert equal(found, whole)
    return False


@pytest.fixture
def whole(tmp_path):
    """The bytes of a checkpoint, and what is restored from them."""
    data = bytes(serialize(tiny_checkpoint()))
    (tmp_path / "whole").write_bytes(data)
    return data, restore(tmp_path / "whole")


def test_a_checkpoint_that_is_cut_is_refused(whole, tmp_path):
    data, found = whole
    for cut in (*range(0, len(data), 97), len(data) - 1):
        assert refused_or_equal(data[:cut], tmp_path / "cut", found)
    assert refused_or_equal(bytes(len(data)), tmp_path / "zeros", found)


@pytest.mark.parametrize("count", [500, pytest.param(8000, marks=pytest.mark.slow)])
def test_flipped_bytes(whole, tmp_path, count):
    data, found = whole
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(count):
        rng = random.Random(number)
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(mutated))
            mutated[at] = rng.randrange(256) if rng.random() < 0.5 else mutated[at] ^ 1 << rng.randrange(8)
        refused += refused_or_equal(mutated, tmp_path / "flipped", found)
    assert refused > count / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB: none took a size at its word


def parts(value: object) -> list[tuple]:
    """Each part of nested dicts and lists, as what holds it and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [part for key in keys for part in [(value, key), *parts(value[key])]]


VALUES = (None, True, -1, 3, 10**30, 0.5, float("nan"), float("-inf"), "text", b"", [], {}, [[]], {"a": 1}, 1j,
    torch.zeros(0), torch.zeros(2), torch.zeros(3, 2), torch.full((3, 2), float("nan")), torch.zeros(3, 2).double(),
    torch.zeros(3, 2, dtype=torch.int64), torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, 2).to_sparse(),
    torch.zeros(3, 2, device="meta"))  # fmt: skip


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_changed_keys_and_values(whole, tmp_path, count):
    """Of any part: removed, renamed, or of another value, type or shape."""
    refused = 0
    for number in range(count):
        rng = random.Random(number)
        changed = copy.deepcopy(tiny_checkpoint())
        fixed = {key: changed.pop(key) for key in ("classes", "acc", "best_acc", "images", "options")}
        parent, key = rng.choice(parts(changed))
        kind = rng.random()
        if kind < 0.2:
            del parent[key]
        elif kind < 0.4 and isinstance(parent, dict):
            parent["other" if rng.random() < 0.5 else 7] = parent.pop(key)
        else:
            parent[key] = rng.choice(VALUES)
        torch.save({"format": 1, **changed, **fixed, "versions": versions()}, tmp_path / "changed")
        try:
            restored = restore(tmp_path / "changed")
        except BadInput as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        # Only numbers that may well be so differ.
        assert all(tensor.isfinite().all() for tensor in [*restored["state_dict"].values(), *restored["optimizer"]])
        assert restored.keys() >= whole[1].keys()
    assert refused > count / 2


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "epoch", "more"])
def test_code_in_a_file_is_not_run(tmp_path, is_zip, key):
    file, trace = tmp_path / "file", tmp_path / "trace"
    contents = {"format": 1, **tiny_checkpoint(), "versions": versions(), key: Hostile(trace)}
    torch.save(contents, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(BadInput, match="carries code, which is never run"):
        load(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # which would run it
    assert trace.exists()


@pytest.mark.parametrize("contents", [[1, 2], torch.ones(3), {}, {"state_dict": {}}, {"weight": 1}, {"state_dict": 3}])
def test_files_that_hold_something_else(contents, tmp_path):
    torch.save(contents, tmp_path / "file")
    with pytest.raises(BadInput, match=r"no checkpoint|no weights"):
        load(tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(BadInput, match="damaged"):
        load(tmp_path / "file")


def test_a_scaler_that_is_none(tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    for change in ({"scale": "a"}, {"scale": float("nan")}, {"growth_factor": None}, {"more": 1.0}):
        saved = tiny_checkpoint() | {"scaler": scaler.state_dict() | change, "file": tmp_path, "missing": []}
        with pytest.raises(BadInput, match="damaged"):
            checkpoint.load_random_state(scaler, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(value):
    for is_weight in (True, False):
        saved = tiny_checkpoint()
        tensor = saved["state_dict"]["weight"] if is_weight else saved["optimizer"]["state"][0]["momentum_buffer"]
        tensor[0, 1] = value
        with pytest.raises(RunFailed, match="not finite"):
            serialize(saved)
