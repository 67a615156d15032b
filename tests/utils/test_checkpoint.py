"""Checkpoints that load as they were written, or are refused in one line."""

import copy
import io
import random
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import tiny_checkpoint
from utils.checkpoint import load, load_optimizer, load_state, load_weights, serialize, versions
from utils.errors import BadInput, RunFailed


def test_prefixes_and_bare_weights(tmp_path):
    state = nn.Linear(2, 3).state_dict()
    for name, contents in (
        ("bare", state),
        ("prefixed", {"state_dict": {f"module.{key}": value for key, value in state.items()}}),
    ):
        torch.save(contents, tmp_path / name)
        loaded = load(tmp_path / name)["state_dict"]
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda state: state.pop("bias"), "lacks bias"),
        (lambda state: state.update(more=torch.zeros(1)), "more"),
        (lambda state: state.update(bias=torch.zeros(4)), r"bias as \[4\], and the network \[3\]"),
    ],
)
def test_weights_that_do_not_fit(change, text, tmp_path):
    model = nn.Linear(2, 3)
    state = dict(nn.Linear(2, 3).state_dict())
    before = model.weight.clone()
    change(state)
    with pytest.raises(BadInput, match=text):
        load_weights(model, state, tmp_path / "file")
    assert torch.equal(model.weight, before)


# --- hostile files


def restore(file: Path) -> dict:
    """All that a run takes from a checkpoint of the linear layer."""
    saved = load(file)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    load_weights(model, saved["state_dict"], file)
    if "optimizer" in saved:
        load_optimizer(optimizer, saved["optimizer"], file)
    if "options" in saved:
        load_state(torch.amp.GradScaler("cpu", enabled=False), saved, file)
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    rest = {name: value for name, value in saved.items() if name not in ("state_dict", "optimizer")}
    return rest | {"state_dict": model.state_dict(), "optimizer": momenta}


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


def test_a_checkpoint_cut_at_any_byte_is_refused(whole, tmp_path):
    data, found = whole
    for cut in range(0, len(data), 7):
        assert refused_or_equal(data[:cut], tmp_path / "cut", found)
    assert refused_or_equal(data[:-1], tmp_path / "cut", found)
    assert refused_or_equal(bytes(len(data)), tmp_path / "zeros", found)


def test_flipped_bytes(whole, tmp_path):
    data, found = whole
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(8000):
        rng = random.Random(number)
        mutated = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(mutated))
            mutated[at] = rng.randrange(256) if rng.random() < 0.5 else mutated[at] ^ 1 << rng.randrange(8)
        refused += refused_or_equal(mutated, tmp_path / "flipped", found)
    assert refused > 6000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB: none took a size at its word


def places(value: object, at: tuple = ()) -> list[tuple]:
    """The keys that lead to each part of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in items for place in [(*at, key), *places(part, (*at, key))]]


VALUES = (None, True, -1, 3, 10**30, 0.5, float("nan"), float("-inf"), "text", b"", [], {}, [[]], {"a": 1}, 1j,
    torch.zeros(0), torch.zeros(2), torch.zeros(3, 2), torch.full((3, 2), float("nan")), torch.zeros(3, 2).double(),
    torch.zeros(3, 2, dtype=torch.int64), torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, 2).to_sparse(),
    torch.zeros(3, 2, device="meta"))  # fmt: skip


def test_changed_keys_and_values(whole, tmp_path):
    """Of any part: removed, renamed, or of another value, type or shape."""
    _, found = whole
    base = tiny_checkpoint()
    own = [place for place in places(base) if place[0] not in ("classes", "acc", "best_acc", "images", "options")]
    refused = 0
    for number in range(2000):
        rng = random.Random(number)
        changed = copy.deepcopy(base)
        *parents, key = rng.choice(own)
        parent = changed
        for each in parents:
            parent = parent[each]
        kind = rng.random()
        if kind < 0.2:
            del parent[key]
        elif kind < 0.4 and isinstance(parent, dict):
            parent["other" if rng.random() < 0.5 else 7] = parent.pop(key)
        else:
            parent[key] = rng.choice(VALUES)
        torch.save({"format": 1, **changed, "versions": versions()}, tmp_path / "changed")
        try:
            restored = restore(tmp_path / "changed")
        except BadInput as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        # Only numbers that may well be so differ.
        assert all(tensor.isfinite().all() for tensor in [*restored["state_dict"].values(), *restored["optimizer"]])
        assert restored.keys() == found.keys()
    assert refused > 1000


BOMB = b"\x80\x02}X\x01\x00\x00\x00wc__builtin__\nbytearray\nJ\x00\x00\x00\x70\x85Rs."  # 1.8 GB of zeros


@pytest.mark.parametrize("name", ["data.pkl", "data.PKL", None])
def test_a_pickle_that_asks_for_memory(tmp_path, name):
    """In an archive as torch.save makes it, or by itself, as old versions had it."""
    file = tmp_path / "file"
    file.write_bytes(BOMB)
    if name is not None:
        with (
            zipfile.ZipFile(io.BytesIO(serialize(tiny_checkpoint()))) as archive,
            zipfile.ZipFile(file, "w") as mutated,
        ):
            for member in archive.infolist():
                is_pickle = member.filename.endswith("data.pkl")
                renamed = zipfile.ZipInfo(member.filename.replace("data.pkl", name))
                mutated.writestr(renamed, BOMB if is_pickle else archive.read(member))
                renamed.external_attr = 0  # as torch has it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadInput, match="damaged") as refused:
        load(file)
    assert "it calls __builtin__ bytearray" in str(refused.value.__cause__)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_file_of_an_old_torch(tmp_path):
    state = {"epoch": 3, "state_dict": {"module.weight": torch.ones(2, 2)}}
    torch.save(state, tmp_path / "file", _use_new_zipfile_serialization=False)
    saved = load(tmp_path / "file")
    assert saved["epoch"] == 3
    assert torch.equal(saved["state_dict"]["weight"], torch.ones(2, 2))


@pytest.mark.parametrize("change", [{"scale": "a"}, {"scale": float("nan")}, {"growth_factor": None}, {"more": 1.0}])
def test_a_scaler_that_is_none(change, tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    saved = tiny_checkpoint() | {"scaler": scaler.state_dict() | change}
    with pytest.raises(BadInput, match="damaged"):
        load_state(scaler, saved, tmp_path)


def test_a_compressed_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/data/0", bytes(10**8))
    with pytest.raises(BadInput, match="damaged"):
        load(tmp_path / "file")


def test_weights_that_are_not_finite_are_not_written():
    for value in (float("nan"), float("inf")):
        saved = tiny_checkpoint()
        saved["state_dict"]["weight"][0, 1] = value
        with pytest.raises(RunFailed, match="not finite"):
            serialize(saved)
        saved = tiny_checkpoint()
        saved["optimizer"]["state"][0]["momentum_buffer"][0, 1] = value
        with pytest.raises(RunFailed, match="not finite"):
            serialize(saved)
