"""The command line, as a user meets it: training, resuming, evaluating, and every refusal."""

import contextlib
import math
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image

import imagenet
import models
from tests.formats import FORMATS
from tests.helpers import SIZES, SMALL, TINY, assert_same_run, checkpoint, draw_folder, start
from utils.logger import COLUMNS, read_log


def test_a_run_and_its_evaluation(command, images, tmp_path):
    run = tmp_path / "some" / "run"
    first = command(*TINY, "-d", images, "-c", run, "--epochs", 3, "--schedule", 1, 2)
    assert first.status == 0
    assert first.err == ""
    for text in (
        "No GPU here: running on the CPU" if not torch.cuda.is_available() else "GPU 0",
        "l_resnet18: 11,400,238 parameters, 222,700 of them in gates",
        "formulation channel, standardized, MWE (channel gate), LWE (activation map)",
        "4 images (--train-batch 4 x --iter-size 1); 3 steps an epoch",
        "make no whole step and wait for another epoch: 1",
        "Epoch 1/3  lr 0.002 ",
        "Epoch 2/3  lr 0.0002 ",
        "Epoch 3/3  lr 2e-05 ",
        f"{run}/model_best.pth.tar",
    ):
        assert text in first.out
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoint.prev.pth.tar",
        "checkpoint.pth.tar",
        "command.txt",
        "log.png",
        "log.txt",
        "model_best.pth.tar",
    ]
    rows = read_log(run / "log.txt")
    assert (run / "log.txt").read_text().splitlines()[0].split("\t")[:5] == list(COLUMNS[:5])
    assert [row["Learning Rate"] for row in rows] == [0.002, 0.0002, 2e-05]
    with Image.open(run / "log.png") as picture:
        assert picture.format == "PNG"

    saved = checkpoint(run)
    assert (saved["format"], saved["epoch"], saved["step"], saved["arch"]) == (1, 3, 0, "l_resnet18")
    assert saved["classes"] == ["ring", "star"]
    assert saved["acc"] == pytest.approx(rows[-1]["Valid Acc."], rel=1e-5)
    assert saved["best_acc"] == pytest.approx(max(row["Valid Acc."] for row in rows), rel=1e-5)
    best = checkpoint(run, "model_best.pth.tar")
    assert best["acc"] == saved["best_acc"]

    before = {path: path.read_bytes() for path in run.iterdir()}
    result = command("-e", "--resume", run, "-j", 0)
    assert result.status == 0
    line = result.out.splitlines()[-1]
    assert f"top-1 {saved['acc']:.2f}" in line
    assert f"loss {saved['log'][-1][2]:.4f}" in line
    assert line.endswith("over 7 images")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_the_resolved_command_repeats_the_run(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--epochs", 1, "--excitation", "we", "--formulation", "paper", "--no-standardize"]
    assert command(*words, "-c", tmp_path / "a").status == 0
    resolved = (tmp_path / "a" / "command.txt").read_text().splitlines()[3].split()
    assert resolved[1] == "imagenet.py"
    words = [word for word in resolved[2:] if not word.startswith("--checkpoint=")]
    assert command(*words, "-c", tmp_path / "b").status == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_any_number_of_workers_gives_the_same_weights(command, images, tmp_path):
    words = [*TINY, "-d", images, "--epochs", 2, "--drop", 0.3]
    for workers in (0, 3):
        assert command(*words, "-j", workers, "-c", tmp_path / str(workers)).status == 0
    assert_same_run(tmp_path / "0", tmp_path / "3")


def test_another_seed_gives_another_run(command, images, tmp_path):
    for seed in (0, 1):
        command(*SMALL, "-d", images, "--epochs", 1, "--manualSeed", seed, "-c", tmp_path / str(seed))
    one, other = (checkpoint(tmp_path / str(seed))["state_dict"]["fc.weight"] for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("formulation", ["channel", "paper"])
def test_micro_batches_in_float64(command, images, tmp_path, formulation):
    torch.set_default_dtype(torch.float64)
    try:
        for batch, iterations in ((12, 1), (3, 4)):
            result = command(
                *(*TINY, "-d", images, "--epochs", 2, "--formulation", formulation, "-c", tmp_path / f"{batch}"),
                *("--train-batch", batch, "--iter-size", iterations),
            )
            assert result.status == 0
    finally:
        torch.set_default_dtype(torch.float32)
    one, other = (checkpoint(tmp_path / batch)["state_dict"] for batch in ("12", "3"))
    for name, value in one.items():
        assert value.dtype == torch.float64
        assert (value - other[name]).norm() <= 1e-9 * max(value.norm(), 1e-3), name
    for row, same in zip(read_log(tmp_path / "12" / "log.txt"), read_log(tmp_path / "3" / "log.txt"), strict=True):
        assert row == pytest.approx(same, rel=1e-5)


def test_micro_batches_in_float32_for_one_step(command, tmp_path):
    folder = draw_folder(tmp_path / "images", {"train": 16, "val": 1})
    for batch, iterations in ((32, 1), (8, 4)):
        words = [*TINY, "-d", folder, "--epochs", 1, "--lr", 0.0125, "-c", tmp_path / str(batch)]
        assert command(*words, "--train-batch", batch, "--iter-size", iterations).status == 0
    one, other = (checkpoint(tmp_path / batch) for batch in ("32", "8"))
    assert one["epoch"] == 1
    for name, value in one["state_dict"].items():
        assert (value - other["state_dict"][name]).norm() <= 1e-5 * max(value.norm(), 1e-2), name


def test_a_plain_line_where_there_is_no_terminal(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.meters.LINE_SECONDS", 0)
    result = command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path / "run")
    lines = [line for line in result.out.splitlines() if line.startswith("Epoch 1/1 ")]
    assert re.match(
        r"Epoch 1/1 2/3 loss \d+\.\d{4}  top-1 [\d.]+  top-5 100.00  data [\d.]+s  batch [\d.]+s  \d+ img/s  "
        r"elapsed 0:00:0\d  ETA 0:00:0\d$",
        lines[1],
    )
    assert "\r" not in result.out
    assert "\x1b" not in result.out


def test_a_bar_on_a_terminal(images, tmp_path):
    ours, terminal = pty.openpty()
    process = start(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path / "run", stdout=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal, on Linux
        while data := os.read(ours, 4096):
            shown += data
    assert process.wait(timeout=60) == 0
    last = shown.decode().split("\r")
    assert any(re.search(r"Epoch 1/1 \|.*\| 3/3 .*top-1", line) for line in last), shown


# --- networks


def test_torchvision_with_excitation_and_batch_norm(command, images, tmp_path):
    words = [*SMALL, "-d", images, "--epochs", 1, "--excitation", "we"]
    channel = command(*words, "-c", tmp_path / "channel")
    assert channel.status == 0
    assert channel.out.count("BatchNorm cancels") == 1
    paper = command(*words, "--formulation", "paper", "-c", tmp_path / "paper")
    assert paper.status == 0
    assert "BatchNorm cancels" not in paper.out
    assert "LWE (location gate)" in paper.out


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(command, images, tmp_path, amp):
    words = [*TINY, "-d", images, "--amp", amp, "-c", tmp_path / "run"]
    assert command(*words, "--epochs", 1).status == 0
    assert command("--resume", tmp_path / "run", "--epochs", 2).status == 0
    saved = checkpoint(tmp_path / "run")
    assert bool(saved["scaler"]) is (amp == "fp16")
    assert all(value.dtype == torch.float32 for value in saved["state_dict"].values())


@pytest.mark.slow
def test_compile(command, images, tmp_path):
    assert command(*TINY, "-d", images, "--epochs", 1, "--compile", "-c", tmp_path / "run").status == 0
    assert command("-e", "--resume", tmp_path / "run", "--compile").status == 0


def test_channels_last_is_the_same_training(command, images, tmp_path):
    # The second of two epochs needs the momentum of the first, which the checkpoint has in the other layout.
    assert command(*TINY, "-d", images, "--epochs", 1, "-c", tmp_path / "first").status == 0
    losses = []
    for layout in ("--no-channels-last", "--channels-last"):
        run = tmp_path / layout
        assert command("--resume", tmp_path / "first", "--epochs", 2, layout, "-c", run).status == 0
        losses.append([row[name] for row in read_log(run / "log.txt") for name in ("Train Loss", "Valid Loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_evaluation_of_another_trainers_weights(command, images, tmp_path):
    state = torchvision.models.resnet18(num_classes=2, norm_layer=lambda n: torch.nn.GroupNorm(32, n)).state_dict()
    file = tmp_path / "gn_ws.pth.tar"
    torch.save({"epoch": 9, "state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    only_val = tmp_path / "data"
    only_val.mkdir()
    (only_val / "val").symlink_to(images / "val")
    words = [*TINY, "-d", only_val, "-e", "--resume", file]
    gates = command(*words)
    assert gates.status == 2
    assert "--excitation none" in gates.err
    assert command(*words, "--excitation", "none").status == 0
    exported = command(*TINY, "-d", images, "--resume", file, "--export", tmp_path / "plain.pth")
    assert exported.status == 2
    assert "of another trainer" in exported.err
    assert not (tmp_path / "plain.pth").exists()


def test_high_learning_rate_is_named(command, images, tmp_path):
    result = command(*SMALL, "-d", images, "--epochs", 1, "--lr", 0.1, "-c", tmp_path / "a")
    assert "suggested: 0.1 x 4 / 256 = 0.0016" in result.out
    result = command(*SMALL, "-d", images, "--epochs", 1, "--lr", 0.003, "-c", tmp_path / "b")
    assert "suggested" not in result.out


@pytest.mark.parametrize("epochs, schedule", [(90, [30, 60]), (100, [30, 60, 90]), (5, []), (9, [6, 3, 3])])
def test_the_rate_is_a_function_of_the_epoch(epochs, schedule):
    for epoch in range(epochs):
        drops = sum(1 for milestone in schedule if milestone <= epoch)
        assert imagenet.learning_rate(0.1, 0.1, schedule, epoch) == pytest.approx(0.1 ** (1 + drops))
    rates = [imagenet.learning_rate(0.4, 0.5, schedule, epoch) for epoch in range(epochs)]
    assert all(after <= before for before, after in pairwise(rates))


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """Random weights of resnet18 where torch.hub keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    file = tmp_path / "home" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    return file


def test_training_from_pretrained_weights(command, images, tmp_path, pretrained):
    words = ["-a", "resnet18", "--pretrained", *SIZES, "-d", images, "-c", tmp_path / "run", "--lr", 0]
    assert command(*words, "--epochs", 1).status == 0
    ours, theirs = checkpoint(tmp_path / "run")["state_dict"], torch.load(pretrained)
    assert torch.equal(ours["layer4.0.conv1.weight"], theirs["layer4.0.conv1.weight"])
    assert ours["fc.weight"].shape == (2, 512)
    pretrained.unlink()  # a resumed run doesn't need them
    assert command("--resume", tmp_path / "run", "--epochs", 2).status == 0


def test_damaged_pretrained_weights(command, images, tmp_path, pretrained):
    pretrained.write_bytes(pretrained.read_bytes()[:1000])
    result = command("-a", "resnet18", "--pretrained", *SIZES, "-d", images, "-c", tmp_path / "run")
    assert result.status == 1
    assert result.err.startswith("imagenet.py: --pretrained: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["-a", "l_resnet50", "--formulation", "paper"],
        ["-a", "l_resnext50", "--cardinality", "8", "--base-width", "4"],
        ["-a", "resnet18", "--excitation", "we", "--formulation", "paper"],
        ["-a", "inception_v3", "--excitation", "lwe", "--image-size", "96"],
    ],
)
def test_exported_weights_load_elsewhere_with_the_same_logits(command, images, tmp_path, words):
    run, file = tmp_path / "run", tmp_path / "plain.pth"
    assert command(*SIZES, "-d", images, "-c", run, "--epochs", 1, "--lr", 0.001, *words).status == 0
    result = command("--resume", run, "--export", file)
    assert result.status == 0
    lines = [line.strip() for line in result.out.splitlines()]
    printed = "\n".join(line for line in lines if line.startswith(("import", "model")))
    scope = {}
    exec(printed, scope)  # what the command tells to do
    saved = checkpoint(run)
    names = ("excitation", "formulation", "standardize", "cardinality", "base_width", "image_size")
    ours = models.create(saved["arch"], num_classes=2, **{name: saved["options"][name] for name in names})
    ours.load_state_dict(saved["state_dict"])
    x = torch.randn(2, 3, saved["options"]["image_size"], saved["options"]["image_size"])
    with torch.no_grad():
        expected = ours.eval()(x)
        torch.testing.assert_close(scope["model"].eval()(x), expected, rtol=1e-4, atol=1e-4)
        if saved["arch"] == "l_resnet50":
            other = timm.create_model("resnet50_gn", num_classes=2).eval()
            other.load_state_dict(torch.load(file, weights_only=True))
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
    before = file.read_bytes()
    assert_refused(command("--resume", run, "--export", file), "--export", file)
    assert file.read_bytes() == before
    assert command("--resume", run, "--export", file, "--overwrite").status == 0
    assert command("--resume", run, "--export", tmp_path / "new" / "plain.pth").status == 0
    assert_refused(command("--resume", run, "--export", file / "plain.pth"), "--export")
    assert_refused(command("--resume", run, "--export", file, "-e"), "--export")


# --- the demo


def test_the_demo_for_an_epoch(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = command("--demo", "--epochs", 1)
    assert first.status == 0
    assert "python imagenet.py -a l_resnet50 --data DIR" in first.out
    assert "checkpoints/demo/log.png" in first.out
    assert len(list(Path("data/demo/train").iterdir())) == 10
    assert sorted(os.listdir("data")) == ["demo"]
    again = command("--demo")
    assert again.status == 2
    assert "--resume checkpoints/demo" in again.err
    assert "--overwrite" in again.err
    finished = command("--demo", "--resume", "checkpoints/demo", "--epochs", 1)
    assert finished.status == 0


# --- what can't be used: one line, status 2, nothing written

BAD_FLAGS = {
    "no data": ([], "--data"),
    "empty path": (["-d", ""], "--data"),
    "empty run": (["-d", "@", "--resume", ""], "--resume"),
    "empty folder": (["-d", "@", "-c", ""], "--checkpoint"),
    "long name": (["-d", "@", "--train-batch", "4", "-a", "shufflenet_v2_x0_5", "-c", "x" * 300], "--checkpoint"),
    "growing rate": (["-d", "@", "--train-batch", "4", "--gamma", "1e200", "--schedule", "0", "0"], "--gamma"),
    "evaluate pretrained l_*": (["-d", "@", "-a", "l_resnet18", "-e", "--pretrained"], "--pretrained"),
    "missing folder": (["-d", "nowhere"], "nowhere"),
    "unknown architecture": (["-d", "@", "-a", "l_resnet51"], "l_resnet50"),
    "unknown flag": (["-d", "@", "--epoch", "3"], "--epoch"),
    "unknown choice": (["-d", "@", "--excitation", "all"], "--excitation"),
    "unknown formulation": (["-d", "@", "--formulation", "x"], "--formulation"),
    "unknown amp": (["-d", "@", "--amp", "int8"], "--amp"),
    **{
        f"{flag} {value}": (["-d", "@", flag, value], flag)
        for flag, values in {
            "--train-batch": ("0", "-1", "x", "1.5"),
            "--test-batch": ("0",),
            "--iter-size": ("0",),
            "--image-size": ("0",),
            "--epochs": ("0", "-3"),
            "--workers": ("-1",),
            "--cardinality": ("0",),
            "--base-width": ("0",),
            "--start-epoch": ("-1", "90"),
            "--lr": ("-0.1", "nan", "inf", "fast"),
            "--gamma": ("nan",),
            "--momentum": ("-1",),
            "--weight-decay": ("inf",),
            "--schedule": ("-30", "x"),
            "--drop": ("1", "-0.1", "nan"),
            "--seed": ("-1", str(2**63)),
            "--gpu-id": ("0,0", "", "x", "-1", "0,"),
        }.items()
        for value in values
    },
    "group too large": (["-d", "@", "--train-batch", "4", "--iter-size", "4"], "--iter-size 4"),
    "evaluation without weights": (["-d", "@", "-e"], "--evaluate"),
    "missing checkpoint": (["-d", "@", "--resume", "nothing.pth.tar"], "nothing.pth.tar"),
    "pretrained l_*": (["-d", "@", "-a", "l_resnet18", "--pretrained", "--train-batch", "4"], "--pretrained"),
    "other classes than the weights": (["-d", "@", "-a", "resnet18", "-e", "--pretrained"], "--pretrained"),
    "excited pretrained": (["-d", "@", "-a", "resnet18", "-e", "--pretrained", "--excitation", "we"], "--excitation"),
    "no norms": (["-d", "@", "-a", "alexnet", "--excitation", "we", "--train-batch", "4"], "normalization"),
    "width": (
        ["-d", "@", "-a", "l_resnext50", "--base-width", "3", "--cardinality", "3", "--train-batch", "4"],
        "--base-width 3",
    ),
    "size": (["-d", "@", "-a", "vit_b_32", "--image-size", "33", "--train-batch", "4"], "vit_b_32"),
    "small": (["-d", "@", "-a", "inception_v3", "--image-size", "33", "--train-batch", "4"], "--image-size 33"),
    "one value": (["-d", "@", "-a", "resnet18", "--image-size", "32", "--train-batch", "1"], "--image-size 32"),
}


def assert_refused(result, *texts) -> None:
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("imagenet.py: ")
    assert "usage" not in result.err
    for text in texts:
        assert str(text) in result.err


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(command, images, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, text = BAD_FLAGS[case]
    result = command("-j", 0, *(str(images) if word == "@" else word for word in words))
    assert_refused(result, text)
    assert os.listdir(tmp_path) == []


def test_bad_folders(command, tmp_path):
    run = tmp_path / "run"
    data = tmp_path / "data"

    def refused(*texts):
        assert_refused(command(*SMALL, "-d", data, "-c", run), *texts)
        assert not run.exists()

    data.mkdir()
    refused("--data", data / "val")
    draw_folder(data, {"val": 1})
    refused("--data", data / "train")
    (data / "train").mkdir()
    refused(data / "train", "no class folders")
    (data / "train" / ".hidden").mkdir()
    refused("no class folders")
    shutil.rmtree(data / "train")
    draw_folder(data, {"train": 4}, ("ring", "cross"))
    refused("val has no folder for the class cross")
    shutil.rmtree(data / "train" / "cross")
    refused("train has no folder for the class star")
    (data / "train" / "star").mkdir()
    refused(data / "train" / "star", "no images")
    (data / "train" / "star" / "notes.txt").write_text("no image")
    refused(data / "train" / "star", "no images")
    shutil.copytree(data / "train" / "ring", data / "train" / "star", dirs_exist_ok=True)
    assert command(*SMALL, "-d", data, "-c", run, "--epochs", 1).status == 0


BAD_IMAGES = {"truncated": lambda data: data[:300], "empty": lambda data: b"", "text": lambda data: b"not an image"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", [*BAD_IMAGES, "folder"])
def test_an_image_that_can_not_be_decoded_is_named(command, images, tmp_path, workers, split, kind):
    folder = shutil.copytree(images, tmp_path / "images")
    bad = folder / split / "ring" / "1.jpg"
    whole = bad.read_bytes()
    bad.unlink()
    if kind == "folder":
        bad.mkdir()
    else:
        bad.write_bytes(BAD_IMAGES[kind](whole))
    result = command(*SMALL, "-d", folder, "-c", tmp_path / "run", "-j", workers, "--epochs", 3)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert str(bad) in result.err
    assert "--skip-bad-images" in result.err


def test_every_format_in_training_and_validation(command, tmp_path):
    for split in ("train", "val"):
        for name in ("ring", "star"):
            (tmp_path / split / name).mkdir(parents=True)
            for file, data in FORMATS.items():
                (tmp_path / split / name / file).write_bytes(data)
    words = [*SMALL, "-d", tmp_path, "--train-batch", len(FORMATS), "--epochs", 1, "-c", tmp_path / "run"]
    assert command(*words).status == 0
    result = command("-e", "--resume", tmp_path / "run")
    assert result.status == 0
    assert f"over {2 * len(FORMATS)} images" in result.out


def test_bad_images_are_left_out_when_told(command, images, tmp_path, stop_after):
    folder = shutil.copytree(images, tmp_path / "images")
    bad = [folder / "train" / "ring" / "1.jpg", folder / "train" / "star" / "2.jpg", folder / "val" / "star" / "0.jpg"]
    for path in bad:
        path.write_bytes(b"damaged")
    words = [*SMALL, "-d", folder, "--epochs", 2, "--skip-bad-images"]
    result = command(*words, "-c", tmp_path / "one")
    assert result.status == 0
    assert [result.err.count(f"the image {path} ") for path in bad] == [1, 1, 1]
    assert "over 6 of 7 images" in result.out
    rows = read_log(tmp_path / "one" / "log.txt")
    # Of 13 training images, a shuffle leaves out one, which may be a bad one.
    assert all(row["Bad Images"] in (2, 3) for row in rows)
    # Whatever the number of workers, and in the middle of an epoch.
    assert command(*words, "-c", tmp_path / "two", "-j", 2).status == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    stop_after(2)
    assert command(*words, "-c", tmp_path / "three").status == 128 + signal.SIGTERM
    assert command("--resume", tmp_path / "three").status == 0
    assert_same_run(tmp_path / "one", tmp_path / "three")
    assert "over 6 of 7 images" in command("-e", "--resume", tmp_path / "one").out


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_but_bad_images(command, images, tmp_path, split):
    folder = shutil.copytree(images, tmp_path / "images")
    for path in (folder / split).glob("*/*"):
        path.write_bytes(b"damaged")
    result = command(*SMALL, "-d", folder, "--epochs", 1, "--skip-bad-images", "-c", tmp_path / "run")
    assert result.status == 1
    assert {"train": "nor can any", "val": "not one of the"}[split] in result.err.splitlines()[-1]


def test_unwritable_run_folder(command, images, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(command(*SMALL, "-d", images, "-c", tmp_path / "file" / "run"), "--checkpoint", tmp_path / "file")
    assert_refused(command(*SMALL, "-d", images, "-c", "/proc/run"), "--checkpoint", "/proc/run")


class Boom:
    """A pickle that would make a file if it were run."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_checkpoints(command, images, tmp_path):
    run = tmp_path / "run"
    command(*SMALL, "-d", images, "--epochs", 1, "-c", run)
    whole = (run / "checkpoint.pth.tar").read_bytes()
    saved = checkpoint(run)
    file = tmp_path / "bad.pth.tar"
    (tmp_path / "evil").mkdir()

    def refused(*texts):
        for words in (["--epochs", 2], ["-e"]):
            assert_refused(command("--resume", file, *words), *texts)
        assert sorted(os.listdir(tmp_path)) == ["bad.pth.tar", "evil", "run"]
        assert os.listdir(tmp_path / "evil") == []

    file.write_bytes(b"no checkpoint")
    refused(file)
    file.write_bytes(b"")
    refused(file)
    file.write_bytes(whole[: len(whole) // 2])
    refused(file)
    for place in (len(whole) // 3, len(whole) // 2):  # among the numbers of the weights or the momentum
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(file, "damaged")
    torch.save([1, 2], file)
    refused(file, "list")
    torch.save({"epoch": 3}, file)
    refused(file, "no weights")
    torch.save(saved | {"boom": Boom(str(tmp_path / "boom"))}, file)
    refused(file, "code")
    file.write_bytes(pickle.dumps(Boom(str(tmp_path / "boom"))))
    refused(file, "code")
    torch.save(saved | {"format": 99}, file)
    refused(file, "format 99")
    torch.save(saved | {"format": torch.zeros(2)}, file)
    refused(file, "format")
    for key in ("epoch", "classes", "options", "state_dict"):
        torch.save({name: value for name, value in saved.items() if name != key}, file)
        refused(file, key)
    for key, value in (("epoch", -5), ("sums", ["a"]), ("sums", [1.0]), ("arch", "resnet18"), ("best_acc", math.nan)):
        torch.save(saved | {key: value}, file)
        refused(file, "options" if key == "arch" else key)
    for name, value, text in (
        ("train_batch", "many", "--train-batch"),
        ("checkpoint", str(tmp_path / "evil"), "options"),
        ("schedule", ["--help"], "options"),
        ("data", "a\0b", "--data"),
        ("image_size", 10**30, "--image-size"),
        ("overwrite", True, "options"),
        ("help", True, "options"),
        (3, True, "options"),
    ):
        torch.save(saved | {"options": saved["options"] | {name: value}}, file)
        refused(file, text)
    weights = saved["state_dict"]
    torch.save(saved | {"state_dict": {name: w for name, w in weights.items() if name != "fc.bias"}}, file)
    refused(file, "fc.bias")
    torch.save(saved | {"state_dict": weights | {"fc.bias": torch.zeros(3)}}, file)
    refused(file, "fc.bias")
    torch.save(saved | {"classes": ["ring", "sun"]}, file)
    refused(file, "classes")
    torch.save(saved | {"state_dict": weights | {"fc.bias": torch.zeros(2).to_sparse()}}, file)
    refused(file)
    wrong = {"momentum_buffer": torch.zeros(1)}
    for optimizer in ({}, saved["optimizer"] | {"state": {0: wrong}}, saved["optimizer"] | {"state": {0: 3}}):
        torch.save(saved | {"optimizer": optimizer}, file)
        assert_refused(command("--resume", file, "--epochs", 2), file, "optimizer")
    torch.save(saved | {"step": 99}, file)
    assert_refused(command("--resume", file, "--epochs", 2), file)


@pytest.mark.parametrize(
    "words, text",
    [
        (["-a", "resnet18"], "--arch resnet18"),
        (["--excitation", "we"], "--excitation we"),
        (["--no-standardize"], "--standardize"),
        (["--start-epoch", "1"], "--start-epoch"),
        (["--pretrained"], "--pretrained"),
    ],
)
def test_a_run_keeps_its_network(command, images, tmp_path, words, text):
    command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert_refused(command("--resume", tmp_path, "--epochs", 2, *words), text)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_classes_than_the_runs(command, images, tmp_path):
    command(*SMALL, "-d", images, "--epochs", 1, "-c", tmp_path / "run")
    other = draw_folder(tmp_path / "other", {"train": 4, "val": 1}, ("ring", "cross"))
    for words in (["-e"], ["--epochs", 2]):
        assert_refused(command("--resume", tmp_path / "run", "-d", other, *words), "--data", other)


def test_a_loss_that_is_not_finite_stops_the_run(command, images, tmp_path):
    run = tmp_path / "run"
    command(*TINY, "-d", images, "--epochs", 1, "-c", run)
    before = (run / "checkpoint.pth.tar").read_bytes()
    result = command("--resume", run, "--epochs", 3, "--lr", "1e30")
    assert result.status == 1
    assert "learning rate 1e+30" in result.err
    assert (run / "checkpoint.pth.tar").read_bytes() == before


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_diverged_epoch_is_not_saved(command, images, tmp_path, amp):
    words = [*TINY, "-d", images, "-c", tmp_path, "--train-batch", 12, "--amp", amp]  # one step in an epoch
    command(*words, "--epochs", 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "command.txt"}
    result = command("--resume", tmp_path, "--epochs", 4, "--lr", "1e30")
    assert result.status == 1
    assert "learning rate 1e+30" in result.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_killed_worker_ends_the_run(images, tmp_path):
    process = start(*SMALL, "-d", images, "--epochs", 3000, "-j", 2, "-c", tmp_path / "run")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pth.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()[0]
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("imagenet.py: a process that loads images died")
    assert "Traceback" not in err


def test_as_a_process(images, tmp_path):
    process = start("-d", tmp_path / "nowhere")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == f"imagenet.py: --data: can't list {tmp_path}/nowhere/val: No such file or directory\n"
    process = start("--help")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    for text in ("data:", "network:", "optimization:", "run:", "devices:", "--train-batch N", "[256]", "--wd X"):
        assert text in out
