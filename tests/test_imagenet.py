"""The command line, as a user meets it: training, evaluating, exporting, and every refusal."""

import math
import multiprocessing
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision

import models
from tests.helpers import (
    EXCITED,
    PATIENCE,
    SIZES,
    SMALL,
    assert_close,
    assert_fails,
    assert_refused,
    assert_same_run,
    changed_logits,
    checkpoint,
    contents,
    copy_folder,
    scores,
    started,
)
from utils.cli import outputs
from utils.reports.logger import read_log
from utils.runs.checkpoint import BEST, LAST, PREVIOUS


def test_a_run_and_its_evaluation(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.reports.meters.LINE_SECONDS", 0)
    run = tmp_path / "some" / "run"
    first = command(*EXCITED, "-d", images, "-c", run, "--epochs", 3, "--schedule", 1, 2, "--keep-freq", 2)
    assert (first.status, first.err) == (0, "")
    for text in (
        "No GPU here: running on the CPU" if not torch.cuda.is_available() else "GPU 0",
        "l_tiny: 85,390 parameters, 1,740 of them in gates",
        "4 images (--train-batch 4 x --iter-size 1); 3 steps an epoch",
        "Images left out of each epoch, as they don't fill a step: 1",
        "Epoch 1/3 2/3  ETA ",  # a line of progress, where there is no terminal
        "Epoch 1/3  lr 0.002 ",
        "Epoch 3/3  lr 2e-05 ",
        f"{run}/{BEST}",
    ):
        assert text in first.out
    assert not {"\r", "\x1b"} & {*first.out}
    kept = "checkpoint.epoch2.pth.tar"
    before = contents(run)
    assert before.keys() == {".lock", PREVIOUS, LAST, kept, "command.txt", "log.png", "log.txt", BEST}
    rows, saved = read_log(run / "log.txt"), checkpoint(run)
    assert [row["Learning Rate"] for row in rows] == [0.002, 0.0002, 2e-05]
    assert (saved["epoch"], saved["step"], saved["arch"], saved["classes"]) == (3, 0, "l_tiny", ["ring", "target"])
    assert saved["acc"] == pytest.approx(rows[-1]["Valid Acc."], rel=1e-5)
    assert saved["best_acc"] == pytest.approx(max(row["Valid Acc."] for row in rows), rel=1e-5)
    assert checkpoint(run, BEST)["acc"] == saved["best_acc"]
    assert checkpoint(run, kept)["epoch"] == 2
    line = command("-e", "--resume", run, "-j", 0).out.splitlines()[-1]
    assert f"loss {saved['log'][-1][2]:.4f} top-1 {saved['acc']:.2f}" in line
    assert line.endswith("over 7 images")
    assert "finished its 3 epochs" in command("--resume", run).out
    assert contents(run) == before


def test_the_resolved_command_repeats_the_run_with_any_number_of_workers(command, finished, images, tmp_path):
    words = [*EXCITED, "-d", images, "--formulation", "paper", "--no-standardize", "--drop", 0.3, "--epochs", 2]
    assert command(*words, "-c", tmp_path / "a").status == 0
    heading, _, _, resolved = (tmp_path / "a" / "command.txt").read_text().splitlines()
    assert heading == f"# as typed in {os.getcwd()}"
    resolved = shlex.split(resolved)
    assert resolved[1] == "imagenet.py"
    words = [word for word in resolved[2:] if not word.startswith(("--checkpoint=", "--workers="))]
    assert command(*words, "--workers", 2, "-c", tmp_path / "b").status == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert command(*words, "-c", tmp_path / "c", "--manualSeed", 1).status == 0
    assert scores(tmp_path / "c") != scores(tmp_path / "a")


def test_micro_batches_in_float64(command, float64, images, tmp_path, formulation):
    for batch, iterations in ((12, 1), (3, 4)):
        words = ["--formulation", formulation, "--train-batch", batch, "--iter-size", iterations]
        assert command(*EXCITED, "-d", images, "--epochs", 3, *words, "-c", tmp_path / f"{batch}").status == 0
    assert checkpoint(tmp_path / "12")["state_dict"]["fc.weight"].dtype == torch.float64
    assert_close(tmp_path / "12", tmp_path / "3", 1e-9)


def test_a_refusal_as_a_process(tmp_path):
    with started("-d", tmp_path / "nowhere", program=("imagenet.py",)) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out.count("\n")) == (2, 1)
    hint = "name the folder that holds train/CLASS/ and val/CLASS/ by --data"
    assert err == f"imagenet.py: --data: {tmp_path}/nowhere isn't here; {hint}\n"


def test_the_demo(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.images.demo.IMAGES", {"train": 4, "val": 1})
    words = ["--demo", "-a", "l_tiny", "--epochs", 1, "-j", 0]
    first = command(*words)
    assert first.status == 0
    assert "imagenet.py -a l_resnet50 --data DIR" in first.out
    assert "checkpoints/demo/log.png" in first.out
    assert "--image-size=32" in Path("checkpoints/demo/command.txt").read_text()
    assert len(os.listdir("data/demo/train")) == 10
    assert os.listdir("data") == ["demo"]
    assert_refused(command(*words), "--resume checkpoints/demo", "--overwrite")
    assert "finished its 1 epoch;" in command("--demo", "--resume", "checkpoints/demo", "--epochs", 1).out


# --- weights from elsewhere, and for elsewhere


def test_evaluation_of_another_trainers_weights(command, images, tmp_path):
    state = models.create("l_tiny", num_classes=2, excitation="none").state_dict()
    file = tmp_path / "gn_ws.pth.tar"
    torch.save({"epoch": 9, "state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(images / "val")
    words = [*EXCITED, "-d", tmp_path / "data", "--resume", file]
    assert_refused(command(*words, "-e"), "--excitation none")
    assert command(*words, "-e", "--excitation", "none").status == 0
    assert_refused(command(*words, "--export", tmp_path / "plain.pth"), "of another trainer")
    assert not (tmp_path / "plain.pth").exists()


def test_pretrained_weights(command, images, tmp_path, monkeypatch):
    """Random ones, where torch.hub keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    file = tmp_path / "home" / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    theirs = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save(theirs, file)
    words = [*SMALL, "-d", images, "--lr", 0, "--pretrained"]
    assert command(*words, "--epochs", 1, "-c", tmp_path / "run").status == 0
    ours = checkpoint(tmp_path / "run")["state_dict"]
    assert torch.equal(ours["conv5.0.weight"], theirs["conv5.0.weight"])
    assert ours["fc.weight"].shape == (2, 1024)
    file.write_bytes(file.read_bytes()[:1000])
    assert_fails(command(*words, "-c", tmp_path / "other"), 1, "--pretrained: ")
    assert not (tmp_path / "other").exists()
    assert command("--resume", tmp_path / "run", "--epochs", 2).status == 0  # which doesn't need them


NETWORKS = {
    "l_resnet50": {"formulation": "paper"},
    "l_resnet18": {"stem": "small"},
    "resnet18": {"excitation": "we", "formulation": "paper", "stem": "small"},
    "shufflenet_v2_x0_5": {"excitation": "we", "formulation": "paper"},
    "l_resnext50": {"cardinality": 8, "stem": "small"},
    "inception_v3": {"excitation": "lwe", "image_size": 96},
}
LARGE = ("l_resnet50", "l_resnext50", "inception_v3")


@pytest.mark.parametrize("arch", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in NETWORKS])
def test_exported_weights_load_elsewhere_with_the_same_logits(command, run, tmp_path, arch):
    saved = checkpoint(run)
    options = saved["options"] | NETWORKS[arch] | {"arch": arch}
    names = ("excitation", "formulation", "standardize", "cardinality", "base_width", "stem", "image_size")
    ours = models.create(arch, num_classes=2, **{name: options[name] for name in names})
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        for module in ours.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # its statistics are those of the images that follow
        ours(torch.randn(4, 3, options["image_size"], options["image_size"]))
    saved |= {"arch": arch, "options": options, "excited": models.excited_names(ours)}
    torch.save(saved | {"state_dict": ours.state_dict(), "optimizer": {"state": {}}}, run / LAST)
    file = tmp_path / "plain.pth"
    result = command("--resume", run, "--export", file)
    assert (result.status, result.err) == (0, "")
    assert_refused(command("--resume", run, "--export", file), "--export", file)
    assert_refused(command("--resume", run, "--export", file / "plain.pth"), "--export")
    assert command("--resume", run, "--export", file, "--overwrite").out == result.out
    lines = [line.strip() for line in result.out.splitlines()]
    scope = {}
    exec("\n".join(line for line in lines if line.startswith(("import", "model"))), scope)  # what it tells to do
    others = [scope["model"]]
    if arch == "l_resnet50":
        others.append(timm.create_model("resnet50_gn", num_classes=2))
        others[1].load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3, options["image_size"], options["image_size"])
    with torch.no_grad():
        for other in others:
            torch.testing.assert_close(other.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch, constructor", [
    ("l_resnext50", "resnet50(num_classes=2, groups=8, width_per_group=16, norm_layer=lambda channels: torch.nn.Group"),
    ("inception_v3", "inception_v3(num_classes=2, aux_logits=False, transform_input=True, init_weights=False)"),
])  # fmt: skip
def test_the_lines_that_load_exported_weights(tmp_path, capsys, arch, constructor):
    words = {"arch": arch, "cardinality": 8, "base_width": 16, "stem": "small", "image_size": 32}
    args = SimpleNamespace(**words, export=str(tmp_path / "plain.pth"))
    outputs.export(args, {"classes": ["a", "b"], "file": "FILE"}, torch.nn.Linear(2, 2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"  model = torchvision.models.{constructor}")
    small = "  model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()"
    assert lines[3] == small


# --- what can't be used: one line, status 2, nothing written

BAD_VALUES = """
    --excitation all  --formulation x  --amp int8  --train-batch 0  --train-batch -1  --train-batch x  --train-batch 1.5
    --test-batch 0  --iter-size 0  --image-size 0  --epochs 0  --epochs -3  --workers -1  --cardinality 0
    --base-width 0  --start-epoch -1  --start-epoch 90  --lr -0.1  --lr nan  --lr inf  --lr fast  --gamma nan
    --momentum -1  --weight-decay inf  --schedule -30  --schedule x  --drop 1  --drop -0.1  --drop nan  --seed -1
    --seed 9223372036854775808  --gpu-id 0,0  --gpu-id ''  --gpu-id x  --gpu-id -1  --gpu-id 0,  --resume ''
    --resume nothing.pth.tar  --checkpoint ''  --data ''  --data nowhere  --epoch 3  --arch l_resnet51
"""
# After "-d IMAGES -a l_tiny --epochs 1" and small sizes; the last of an option counts.
BAD_COMBINATIONS = {
    "-a l_resnet51": "close are l_resnet50",
    "--shedule 3": "close are --schedule",
    "-b 3": "-b: no such option; here it is --train-batch",
    "--lr_scheduler cosine": "here it is --schedule for drops, or --cosine",
    "-a resnet50_gn": "--arch l_resnet50 --excitation none --no-standardize",
    "--excitation paper": "--excitation: paper is a choice of --formulation",
    "-a resnet18 --formulation paper": "--formulation: resnet18 stays plain",
    "-a squeezenet1_1 --excitation we": "every convolution plain",
    "-a squeezenet1_1 --image-size 8": "--image-size 8",
    "-a squeezenet1_1 --stem small": "--stem small",
    "-a vit_b_32 --image-size 33": "vit_b_32",
    "-a shufflenet_v2_x0_5 --train-batch 1": "--image-size 32",
    "-a l_resnext50 --base-width 3 --cardinality 3": "--base-width 3",
    "--train-batch 4 --iter-size 4": "--iter-size 4",
    f"-c {'x' * 300}": "--checkpoint",
    "-c FILE/run": "--checkpoint",
    "--pretrained": "--pretrained",
    "-e": "--evaluate: there are no weights",
    "-e --pretrained": "--pretrained",
    "-e --pretrained -a shufflenet_v2_x0_5": "--pretrained",
    "-e --pretrained -a shufflenet_v2_x0_5 --excitation we": "--excitation",
    "--export a.pth": "--export: it needs --resume RUN",
    "--export a.pth -e": "--export: it can't be combined with --evaluate",
    "--visualize a": "--visualize: it needs --resume RUN",
    "--visualize a --export b": "--visualize: it can't be combined with --export",
}
PAIRS = shlex.split(BAD_VALUES)
BAD_FLAGS = {f"{flag} '{value}'": flag for flag, value in zip(PAIRS[::2], PAIRS[1::2], strict=True)} | BAD_COMBINATIONS


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags(command, images, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    given = [word.replace("FILE", str(images / "train" / "ring" / "0.jpg")) for word in shlex.split(words)]
    assert_refused(command(*EXCITED, "-d", images, "--epochs", 1, *given), BAD_FLAGS[words])
    assert os.listdir(tmp_path) == []


def test_no_data(command, images):
    assert_refused(command(), "--data: name the folder")
    assert_refused(command("-d", images / "train"), f"did you mean {images}?")


def test_bad_checkpoints(command, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, saved, whole = tmp_path / "bad.pth.tar", checkpoint(finished), (finished / LAST).read_bytes()
    weights, options, place = saved["state_dict"], saved["options"], len(whole) // 2
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content, text in (
        (b"", "empty"),
        (flipped, "damaged"),
        (saved | {"code": os.getcwd}, "code"),
        (saved | {"format": 99}, "format 99"),
        (saved | {"epoch": -5}, "epoch"),
        (saved | {"options": options | {"image_size": 10**30}}, "options"),
        (saved | {"options": options | {"schedule": ["--help"]}}, "options"),
        (saved | {"arch": "resnet18"}, "options"),
        (saved | {"state_dict": weights | {"fc.bias": torch.full((2,), math.nan)}}, "fc.bias"),
        (saved | {"state_dict": weights | {"fc.bias": torch.zeros(3)}}, "fc.bias"),
        (saved | {"step": 99}, "in the middle of an epoch"),
        (saved | {"rng": {}}, "random state"),
        (saved | {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}}}, "optimizer"),
    ):
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        assert_refused(command("--resume", file, "--epochs", 3), file, text)
    assert os.listdir(tmp_path) == ["bad.pth.tar"]


def test_a_run_keeps_its_network(command, run):
    before = contents(run)
    network = ("-a resnet18", "--excitation none", "--formulation paper", "--no-standardize", "--stem small")
    network += ("--cardinality 8", "--base-width 8", "--decay weights")
    for words in (*network, "--start-epoch 1", "--pretrained"):
        text = words.replace("--no-", "--").replace("-a", "--arch").replace("epoch 1", "epoch")
        assert_refused(command("--resume", run, "--epochs", 3, *words.split()), text)
    assert contents(run) == before


# --- images


@pytest.mark.parametrize("workers, split", [(0, "train"), (2, "val")])
def test_an_image_that_can_not_be_decoded_is_named(command, images, tmp_path, workers, split):
    """An epoch that fails leaves no run, so that the folder can be used at once."""
    folder = shutil.copytree(images, tmp_path / "images")
    bad = folder / split / "target" / "1.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:300])
    words = [*EXCITED, "-d", folder, "-c", tmp_path / "run", "-j", workers, "--epochs", 2]
    assert_fails(command(*words), 1, bad, "--skip-bad-images")
    bad.write_bytes(whole)
    assert command(*words).status == 0


def test_bad_images_are_left_out_when_told(command, images, tmp_path, stop_after):
    folder = shutil.copytree(images, tmp_path / "images")
    bad = [folder / name for name in ("train/ring/1.jpg", "train/target/2.jpg", "val/target/0.jpg")]
    for path in bad:
        path.write_bytes(b"damaged")
    words = [*EXCITED, "-d", folder, "--epochs", 2, "--skip-bad-images"]
    result = command(*words, "-c", tmp_path / "one")
    assert result.status == 0
    assert [result.err.count(f"the image {path} ") for path in bad] == [1, 1, 1]
    assert "over 6 of 7 images" in result.out
    # Of 13 training images, a shuffle leaves out one, which may be a bad one.
    assert all(row["Bad Images"] in (2, 3) for row in read_log(tmp_path / "one" / "log.txt"))
    # Whatever the number of workers, and in the middle of an epoch.
    stop_after(2)
    assert command(*words, "-c", tmp_path / "two", "-j", 2).status == 128 + signal.SIGTERM
    assert command("--resume", tmp_path / "two").status == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_run_that_gets_nothing_right_has_a_best_checkpoint(command, images, run, tmp_path):
    """Of the images of a class that the weights never guess, as those of the other can't be decoded; the first one."""
    folder = copy_folder(images, tmp_path / "images")
    for file in (folder / "val" / "ring").iterdir():
        file.write_bytes(b"")
    saved = checkpoint(run, BEST)
    saved["state_dict"]["fc.weight"].zero_()
    saved["state_dict"]["fc.bias"].copy_(torch.tensor([1.0, 0.0]))  # ring
    torch.save(saved, run / BEST)
    words = ["-d", folder, "--skip-bad-images", "--epochs", 2, "--lr", 0, "-c", tmp_path / "new"]
    assert command("--init", run, *SIZES, *words).status == 0
    best = checkpoint(tmp_path / "new", BEST)
    assert (best["acc"], best["epoch"]) == (0, 1)


def test_a_validation_without_a_single_image_is_none(command, images, run, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    for path in (folder / "val").glob("*/*"):
        path.write_bytes(b"damaged")
    ended = command("-e", "--resume", run, "-d", folder, "--skip-bad-images")
    assert ended.status == 1
    assert "not one of the validation images can be decoded" in ended.err.splitlines()[-1]


def test_a_killed_worker_ends_the_run(command, images, tmp_path):
    before, killed = multiprocessing.active_children(), []

    def kill_one(logits):
        if not killed:
            killed.append((set(multiprocessing.active_children()) - {*before}).pop())
            killed[0].kill()

    with changed_logits(kill_one):
        ended = command(*EXCITED, "-d", images, "--epochs", 1000, "-j", 2, "-c", tmp_path / "run")
    assert_fails(ended, 1, "a process that loads images died")
