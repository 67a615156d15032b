"""Checkpoints that load as they were written, or are refused in one line."""

import argparse
import collections
import contextlib
import copy
import functools
import os
import random
import resource
import shlex
import shutil
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import models
from models.layers import Conv2d
from tests.helpers import tiny_checkpoint
from utils.errors import BadInput, RunFailed
from utils.network.optimizers import load_optimizer
from utils.runs import checkpoint
from utils.runs.checkpoint import BEST, LAST, PREVIOUS, find, load, serialize, versions
from utils.runs.reading import read_file
from utils.runs.weights import load_initial_weights, load_weights
from utils.words import shortest

# --- files of other trainers, tools and times


def network() -> nn.Sequential:
    """A small one with BatchNorm, whose statistics are of something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model(torch.randn(8, 3, 5, 5))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    """With momenta."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.randn(8, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return optimizer


def without_counters(state: dict) -> dict:
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


def save_by_torch_0_3(contents: object, file: Path) -> None:
    """As that version pickled tensors; the file's format was the same up to torch 1.5."""

    def reduce(tensor: torch.Tensor, protocol: int) -> tuple:
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        parts = storage, tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
        return torch._utils._rebuild_tensor, parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__reduce_ex__", reduce)
        torch.save(contents, file, _use_new_zipfile_serialization=False)
    assert b"_rebuild_tensor\n" in file.read_bytes()


def save_by_timm(model: nn.Module, file: Path) -> None:
    args = argparse.Namespace(model="resnet18", lr=0.1)
    saver = timm.utils.CheckpointSaver(model, optimizer_of(model), args=args, checkpoint_dir=str(file.parent))
    saver.save_checkpoint(epoch=4, metric=61.5)
    shutil.move(file.parent / "last.pth.tar", file)


class Settings:
    """A class that only the trainer that wrote the file knows."""


WRITERS = {
    "bare": lambda model, file: torch.save(model.state_dict(), file),
    "net": lambda model, file: torch.save({"net": model.state_dict(), "acc": 61.5}, file),
    "model_state_dict": lambda model, file: torch.save({"model_state_dict": model.state_dict()}, file),
    "torchvision": lambda model, file: torch.save(
        {"model": model.state_dict(), "epoch": 4, "args": argparse.Namespace(lr=0.1), "lr_scheduler": {}}, file
    ),
    "timm": save_by_timm,
    "both": lambda model, file: torch.save(nn.DataParallel(torch.compile(nn.DataParallel(model))).state_dict(), file),
    "torch 0.3": lambda model, file: save_by_torch_0_3({"state_dict": without_counters(model.state_dict())}, file),
    "no counters": lambda model, file: torch.save(without_counters(model.state_dict()), file),
    "safetensors": lambda model, file: safetensors.torch.save_file(model.state_dict(), file),
    "bfloat16": lambda model, file: torch.save(model.bfloat16().state_dict(), file),
    "other classes": lambda model, file: torch.save(
        {
            "state_dict": model.state_dict(),
            "paths": [Path("x")],
            "scores": np.ones(3),
            "settings": Settings(),
            "log": collections.defaultdict(list, a=[1]),
        },
        file,
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_weights_of_others_give_their_logits(tmp_path, kind):
    theirs, ours, images = network(), network(), torch.randn(2, 3, 5, 5)
    for tensor in (*ours.parameters(), *ours.buffers()):
        tensor.data.zero_()
    WRITERS[kind](theirs, tmp_path / "file")
    saved = load(tmp_path / "file")
    load_weights(ours, saved)
    assert torch.equal(ours.eval()(images), theirs.float().eval()(images))
    # Both name the last epoch.
    assert saved["epoch"] == (5 if kind in ("torchvision", "timm") else 0)


def test_gates_of_public_code(tmp_path):
    """They are 1 x 1 convolutions of the layer itself; their momenta don't fit, and are left out."""
    layer, ours = (Conv2d(32, 4, 3, formulation="paper") for _ in range(2))
    theirs = {name.replace("gate.", ""): value for name, value in layer.state_dict().items()}
    theirs |= {name: theirs[name][..., None, None] for name in ("fc1.weight", "fc2.weight")}
    state = {f"conv.{name}": value for name, value in theirs.items()}
    torch.save({"state_dict": state, "optimizer": optimizer_of(network()).state_dict()}, tmp_path / "file")
    saved = load(tmp_path / "file")
    assert "optimizer" in saved["missing"]
    load_weights(model := nn.ModuleDict({"conv": ours}), saved)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in model["conv"].state_dict().items())


@pytest.mark.parametrize("is_old", [True, False])
def test_momenta_of_others(tmp_path, is_old):
    """Before torch 1.6, a parameter's key was its address."""
    model = network()
    optimizer = optimizer_of(model)
    state = optimizer.state_dict()
    if is_old:
        keys = [10**14 - index for index in state["state"]]
        state["state"] = {keys[index]: entry for index, entry in sorted(state["state"].items(), reverse=True)}
        state["param_groups"][0]["params"] = keys
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "optimizer": state}, tmp_path / "file")
    saved = load(tmp_path / "file")
    assert saved["missing"] == ["options", "classes", "log", "best top-1", "random state"]
    ours = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    load_optimizer(ours, saved)
    for parameter in model.parameters():
        assert torch.equal(*(one.state[parameter]["momentum_buffer"] for one in (ours, optimizer)))


def test_momenta_are_those_of_their_weights_in_any_memory_layout():
    """A step of the fused optimizer after --channels-last has changed is that of one whose layout stays."""
    conv = torch.nn.Conv2d(2, 3, 3)
    x, steps = torch.randn(4, 2, 5, 5), []
    before = torch.optim.SGD(conv.parameters(), 0.1, 0.9, fused=True)
    conv(x).square().sum().backward()
    before.step()
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = copy.deepcopy(conv).to(memory_format=layout)
        optimizer = torch.optim.SGD(ours.parameters(), 0.1, 0.9, fused=True)
        load_optimizer(optimizer, {"optimizer": before.state_dict(), "file": "x"})
        ours.zero_grad()
        ours(x).square().sum().backward()
        optimizer.step()
        steps.append(ours.weight)
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta"])
def test_the_state_of_any_optimizer_is_restored(tmp_path, kind):
    """To the last bit, and the steps that follow too, in another memory layout."""
    torch.manual_seed(0)
    x, convs = torch.randn(4, 2, 5, 5), [torch.nn.Conv2d(2, 3, 3)]
    make = functools.partial(getattr(torch.optim, kind), lr=0.01, **{"momentum": 0.9} if kind == "SGD" else {})

    def step(conv: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        conv(x).square().sum().backward()
        optimizer.step()

    optimizers = [make(convs[0].parameters())]
    for _ in range(3):
        step(convs[0], optimizers[0])
    convs.append(copy.deepcopy(convs[0]).to(memory_format=torch.channels_last))
    optimizers.append(make(convs[1].parameters()))
    load_optimizer(optimizers[1], {"optimizer": copy.deepcopy(optimizers[0].state_dict()), "file": "x"})
    before, after = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for index, parameter in enumerate(convs[1].parameters()):
        assert before[index].keys() == after[index].keys()
        for name, value in before[index].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, after[index][name])
                assert value.ndim == 0 or after[index][name].stride() == parameter.stride()
    for conv, optimizer in zip(convs, optimizers, strict=True):
        step(conv, optimizer)
    torch.testing.assert_close(convs[0].weight, convs[1].weight)


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    conv = torch.nn.Conv2d(2, 3, 3)
    conv(torch.randn(4, 2, 5, 5)).square().sum().backward()
    sgd, adam = torch.optim.SGD(conv.parameters(), 0.1, 0.9), torch.optim.AdamW(conv.parameters())
    sgd.step(), adam.step()
    for ours, theirs in ((sgd, adam), (adam, sgd)):
        with pytest.raises(BadInput, match="the optimizer in x doesn't fit this run's"):
            load_optimizer(ours, {"optimizer": theirs.state_dict(), "file": "x"})


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_classes_are_in_one_unicode_form(tmp_path, form):
    """That of folders, whatever form an older checkpoint has."""
    file, classes = tmp_path / "file", [unicodedata.normalize(form, "café"), "b", "c"]
    file.write_bytes(serialize(tiny_checkpoint() | {"classes": classes}))
    assert load(file)["classes"] == [unicodedata.normalize("NFC", "café"), "b", "c"]


TOP1 = [(61.5, 61.5), (61, 61.0), (torch.tensor(61.5), 61.5), (torch.tensor([61.5]), 61.5), (np.float64(61.5), 61.5),
    (np.float32(61.5), 61.5), (np.array([61], ">i2")[0], 61.0), (np.mean([0, 1]), 0.5), (0, 0.0), (float("nan"), None),
    (torch.tensor(float("inf")), None), (torch.ones(2), None), (101, None), (-1, None), ("61", None),
    (np.str_("1"), None), (None, None)]  # fmt: skip


@pytest.mark.parametrize("key", ["best_acc", "best_acc1"])
@pytest.mark.parametrize("value, expected", TOP1)
def test_the_best_top1_of_others(tmp_path, key, value, expected):
    torch.save({"state_dict": network().state_dict(), key: value}, tmp_path / "file")
    saved = load(tmp_path / "file")
    assert saved["best_acc"] == (-1 if expected is None else expected)
    assert ("best top-1" in saved["missing"]) == (expected is None)
    text = checkpoint.describe_resumption(saved, epochs=3, steps=5)
    assert ("best top-1\nNot in it" in text) == (expected is not None)


def test_a_number_of_numpy_1(tmp_path):
    torch.save({"a": torch.ones(1), "n": np.float64(2)}, tmp_path / "file", _use_new_zipfile_serialization=False)
    data = (tmp_path / "file").read_bytes()
    assert b"numpy._core.multiarray\n" in data
    (tmp_path / "file").write_bytes(data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert read_file(tmp_path / "file")["n"] == 2.0


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("key", [None, "net", "model"])
def test_a_whole_model_is_named_with_the_command_that_converts_it(tmp_path, monkeypatch, is_zip, key):
    model, file = network(), tmp_path / "it's $HOME.pth"
    torch.save({key: model, "acc": 61.5} if key else model, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(BadInput, match=r"needs the code of torch.nn.modules.container.Sequential, ") as refusal:
        load(file)
    assert not isinstance(refusal.value, checkpoint.NotWhole)
    words = shlex.split(str(refusal.value).partition("keeps the weights: ")[2])
    assert words[:2] == [shortest(Path(sys.executable)), "-c"]
    monkeypatch.chdir(tmp_path)
    exec(words[2], {})
    assert equal(load(tmp_path / "it's $HOME-weights.pth")["state_dict"], dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_torchscript_archive(tmp_path, monkeypatch):
    model = network()
    torch.jit.save(torch.jit.script(model), tmp_path / "file.pt")
    with pytest.raises(BadInput, match="a TorchScript archive") as refusal:
        load(tmp_path / "file.pt")
    assert "torch.jit.load(" in str(refusal.value)  # torch.load warns of such files
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(str(refusal.value).partition("keeps the weights: ")[2])[2], {})
    assert equal(load(tmp_path / "file-weights.pth")["state_dict"], dict(model.state_dict()))


@pytest.mark.parametrize(
    "start", ["<!DOCTYPE html>", "version https://git-lfs", "\x89HDF\r\n", "\x08\x07\x12\x07pytorch"]
)
def test_what_is_no_checkpoint_is_not_called_damaged(tmp_path, start):
    """Such a file in a run's folder is no reason to go back, either, as zeros are."""
    data = start.encode("latin1")
    for name, contents in ((LAST, data * 9), (PREVIOUS, serialize(tiny_checkpoint()))):
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(BadInput, match=r"^--resume: .* is no checkpoint of PyTorch") as refusal:
        find(str(tmp_path))
    assert repr(data[:15])[1:-1] in str(refusal.value)
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(BadInput, match="no checkpoint of PyTorch, but another kind of zip"):
        load(tmp_path / "arrays.npz")
    (tmp_path / LAST).write_bytes(bytes(100))
    assert find(str(tmp_path))["file"].name == PREVIOUS


def test_safetensors_that_are_cut_or_can_not_be_read(tmp_path, monkeypatch):
    file = tmp_path / "file"  # its name tells nothing
    safetensors.torch.save_file(network().state_dict(), file)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match="is damaged"):
        load(tmp_path / "cut")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match="needs the package safetensors"):
        load(file)


# --- weights that begin a training

CLASSES = ["a", "b"]
BEGINNINGS = [  # of l_tiny on which classes, with what; the options of the network; what is made anew, and what is told
    (CLASSES, {}, {}, [], []),
    ([], {}, {}, [], ["classifier fc is kept: FILE has as many classes, and doesn't name them"]),
    (["a", "c"], {}, {}, ["fc."], ["classifier fc is new"]),
    (["a", "b", "c"], {}, {}, ["fc."], ["classifier fc is new"]),
    (CLASSES, {"excitation": "none"}, {}, [".gate."], ["The gates are new: FILE has none"]),
    (CLASSES, {"excitation": "lwe"}, {"excitation": "none"}, [], []),
    (CLASSES, {}, {"excitation": "none"}, [], ["gates of FILE are left out: the network has none"]),
    (CLASSES, {}, {"formulation": "paper"}, [".gate."], ["are left out: the network has others", "FILE has others"]),
]  # fmt: skip


@pytest.mark.parametrize("classes, theirs, options, anew, told", BEGINNINGS)
def test_weights_that_begin_a_training(classes, theirs, options, anew, told, capsys):
    state = models.create("l_tiny", num_classes=len(classes) or 2, **theirs).state_dict()
    state = {name: torch.full_like(value, 0.5) for name, value in state.items()}
    ours = models.create("l_tiny", num_classes=2, **options)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    load_initial_weights(ours, {"state_dict": state, "classes": classes, "file": Path("FILE")}, CLASSES, "fc")
    for name, value in ours.state_dict().items():
        expected = before[name] if any(part in name for part in anew) else state[name]
        assert torch.equal(value, expected), name
    out = capsys.readouterr().out
    assert out.startswith("Beginning with the weights of FILE\n")
    assert all(text in out for text in told)
    assert out.count("\n") == 1 + len(told)


NO_BEGINNING = [({"fc.weight": torch.zeros(5, 7)}, "FILE has fc.weight as "), ({"more": torch.ones(1)}, "has more"),
    ({"conv1.weight": torch.ones(64, 1, 7, 7)}, "FILE has conv1.weight as ")]  # fmt: skip


@pytest.mark.parametrize("change, text", NO_BEGINNING)
def test_weights_that_can_not_begin_a_training(change, text):
    state = models.create("l_tiny", num_classes=5).state_dict() | change
    saved = {"state_dict": state, "classes": [], "file": Path("FILE")}
    with pytest.raises(BadInput, match=f"^--init: .*{text}"):
        load_initial_weights(models.create("l_tiny", num_classes=2), saved, CLASSES, "fc")


def test_the_checkpoint_that_begins_a_training_is_the_best(tmp_path, capsys):
    for name, epoch in ((BEST, 1), (LAST, 2)):
        (tmp_path / name).write_bytes(serialize(tiny_checkpoint(epoch)))
    assert find(str(tmp_path), "--init")["file"].name == BEST
    (tmp_path / BEST).write_bytes(b"")
    assert find(str(tmp_path), "--init")["file"].name == LAST
    assert "is damaged: it is empty or cut short; give another file\nGoing back to" in capsys.readouterr().out
    for name in (BEST, LAST):
        (tmp_path / name).unlink()
    with pytest.raises(BadInput, match=f"^--init: there is no checkpoint .*/{LAST}$"):
        find(str(tmp_path), "--init")


# --- what doesn't fit, and what is damaged

UNFIT = [({}, "lacks bias"), ({"bias": torch.zeros(3), "more": torch.zeros(1)}, "has more"),
    ({"bias": torch.zeros(4)}, r"bias as \[4\] .*, and the network \[3\]"),
    ({"bias": torch.zeros(3).long()}, r"bias as .*int64, and the network .*float32")]  # fmt: skip


@pytest.mark.parametrize("bias, text", UNFIT)
def test_weights_that_do_not_fit(bias, text, tmp_path):
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(BadInput, match=text):
        load_weights(model, {"state_dict": {"weight": torch.zeros(3, 2), **bias}, "file": tmp_path})
    assert torch.equal(model.weight, before)


def restore(file: Path) -> dict:
    """All that a run takes from a checkpoint of the linear layer."""
    saved = load(file)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    load_weights(model, saved)
    load_optimizer(optimizer, saved)
    checkpoint.load_scaler_and_random_state(torch.amp.GradScaler("cpu", enabled=False), saved)
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


@pytest.mark.parametrize("method", [8, 12, 14, 99])
def test_members_that_claim_to_be_compressed(whole, tmp_path, method):
    """A flipped byte of the zip's directory: deflate, bzip2, LZMA, and what there is not."""
    data, found = whole
    mutated, at = bytearray(data), data.index(b"PK\1\2")
    while at >= 0:
        mutated[at + 10] = method
        at = data.find(b"PK\1\2", at + 1)
    assert refused_or_equal(mutated, tmp_path / "compressed", found)


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


@pytest.mark.parametrize("key", ["best_acc", "acc", "seconds"])
def test_a_number_that_is_not_finite_is_damage(tmp_path, key):
    file = tmp_path / "x"
    torch.save({"format": 1, **tiny_checkpoint(), "versions": versions(), key: float("nan")}, file)
    with pytest.raises(BadInput, match=f"it has no usable '{key}'"):
        load(file)


class Hostile:
    """Its pickle calls a function when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "epoch", "more"])
@pytest.mark.parametrize("function", [os.mkdir, eval, shutil.copyfile])
def test_code_in_a_file_is_not_run(tmp_path, is_zip, key, function):
    file, trace = tmp_path / "file", tmp_path / "trace"
    words = {eval: [f"__import__('os').mkdir({str(trace)!r})"], shutil.copyfile: [str(file), str(trace)]}
    hostile = Hostile(function, *words.get(function, [str(trace)]))
    contents = {"format": 1, **tiny_checkpoint(), "versions": versions(), key: hostile}
    torch.save(contents, file, _use_new_zipfile_serialization=is_zip)
    # A stand-in takes the place of what torch knows nothing of; where it isn't needed, the rest is taken.
    may_load = function is not os.mkdir
    with contextlib.suppress(BadInput) if may_load else pytest.raises(BadInput, match=r"needs the code of .*never run"):
        assert "more" in load(file)
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
            checkpoint.load_scaler_and_random_state(scaler, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(value):
    for place in ("weights", "average", "momentum"):
        saved = tiny_checkpoint()
        saved["ema"] = copy.deepcopy(saved["state_dict"])
        tensors = {"weights": saved["state_dict"]["weight"], "average": saved["ema"]["weight"]}
        tensors["momentum"] = saved["optimizer"]["state"][0]["momentum_buffer"]
        tensors[place][0, 1] = value
        with pytest.raises(RunFailed, match="not finite"):
            serialize(saved)
