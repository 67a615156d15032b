"""The study: its statistics against textbooks, its runs through the command, and what is stored in the repository."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from benchmarks import fashion_mnist, study
from tests.helpers import ROOT, draw_folder
from utils.logger import read_log

STORED = ROOT / "benchmarks" / "fashion-mnist-10k"
FEW = {
    "l_resnet18": {name: study.NETWORKS["l_resnet18"][name] for name in ("none", "map")},
    "resnet18": {"none, no WS": study.NETWORKS["resnet18"]["none, no WS"]},
}
OPTIONS = ["--", "--epochs", "2", "--image-size", "32", "--train-batch", "4", "--test-batch", "4"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the study's main() over two variants of one network and one of the other; gives status, stdout, stderr."""
    monkeypatch.setattr(study, "NETWORKS", FEW)

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["study", *map(str, words)])
        return study.main(), *capsys.readouterr()

    return run


@contextlib.contextmanager
def holding(folder: Path, seconds: int) -> Iterator[subprocess.Popen]:
    """Another process that has the folder's lock."""
    code = "import pathlib, sys, time, utils.run_folder as r; r.take_lock(pathlib.Path(sys.argv[1]), '')"
    code += f"; print(flush=True); time.sleep({seconds})"
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process


@pytest.mark.parametrize(
    ("freedom", "probability", "quantile"),
    # From the tables of textbooks.
    [
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (4, 0.975, 2.776),
        (4, 0.95, 2.132),
        (9, 0.975, 2.262),
        (100, 0.975, 1.984),
    ],
)
def test_student_t(freedom, probability, quantile):
    assert study.student_t(freedom, probability) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, (2000, 5))
    intervals = [study.interval(list(values)) for values in draws]
    assert np.mean([abs(mean - 3) < half for mean, half in intervals]) == pytest.approx(0.95, abs=0.015)


def test_the_map_is_one_network_in_both_formulations():
    outputs = []
    for options in ({"excitation": "lwe", "formulation": "channel"}, {"excitation": "mwe", "formulation": "paper"}):
        torch.manual_seed(0)
        outputs.append(models.create("l_resnet18", num_classes=3, **options)(torch.ones(1, 3, 32, 32)))
    assert torch.equal(*outputs)


def test_a_study(run, images, tmp_path):
    out = tmp_path / "study"
    words = ["--data", images, "--out", out, "--seeds", 2, "--rates", 0.001, 1e9, "--jobs", 2, *OPTIONS]
    status, text, errors = run(*words)
    # A rate at which nothing trains is told, is in the table, and isn't chosen.
    assert (status, errors) == (0, "")
    assert text.count("rate 1e+09, seed 1000: diverged") == 2
    assert "Epoch 1/2" in (out / "l_resnet18" / "none" / "lr1e+09-seed1000" / "diverged.txt").read_text()
    assert "rate 4/4" in text
    assert "run 6/6" in text
    assert not list(out.rglob("*.pth.tar"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    logs = {log.relative_to(out).parent.as_posix(): read_log(log) for log in out.rglob("log.txt")}
    assert [row[:2] for row in table[2:5]] == [
        ["l_resnet18, GroupNorm", "none"],
        ["l_resnet18, GroupNorm", "map"],
        ["resnet18, BatchNorm", "none, no WS"],
    ]
    none, mapped = (
        [logs[f"l_resnet18/{name}/lr0.001-seed{seed}"][-1]["Valid Acc."] for seed in (0, 1)] for name in ("none", "map")
    )
    differences = [a - b for a, b in zip(mapped, none, strict=True)]
    half = 12.706 * statistics.stdev(differences) / 2**0.5
    assert table[3][3:6] == [f"{statistics.mean(mapped):.2f}", f"{statistics.stdev(mapped):.2f}", "2 of 2"]
    assert float(table[3][6]) == pytest.approx(statistics.mean(differences), abs=0.006)
    low, high = map(float, table[3][7].split(" to "))
    assert (high - low) / 2 == pytest.approx(half, abs=0.02)
    assert table[-2][0] == "l_resnet18, none"
    assert table[-2][2:] == ["diverged", "0.001"]
    assert all(rows[0]["Learning Rate"] == 0.001 for rows in logs.values())

    # Again from the logs alone: the same; and a run that is missing is made, and nothing else.
    first = (out / "results.md").read_text()
    shutil.rmtree(out / "l_resnet18" / "map" / "lr0.001-seed1")
    # One that ended with the study, before its checkpoints were deleted.
    leftover = out / "l_resnet18" / "map" / "lr0.001-seed0" / "model_best.pth.tar"
    leftover.write_text("")
    assert run("--out", out)[1].count("| 1 of 2 |") == 1
    (out / "l_resnet18" / "map" / "lr0.001-seed1").mkdir()
    with holding(out / "l_resnet18" / "map" / "lr0.001-seed1", seconds=2):  # as a run that a killed study left
        status, text, errors = run(*words)
    assert (status, errors) == (0, "")
    assert "run 6/6  l_resnet18, map, rate 0.001, seed 1: top-1" in text
    assert "run 5/6" not in text
    assert "rate 4/4" not in text
    assert not leftover.exists()
    assert (out / "results.md").read_text() == first
    assert run("--out", out) == (0, first, "")
    with Image.open(out / "results.png") as picture:
        assert picture.size[0] > 1000
    header, *rows = [line.split("\t") for line in (out / "results.tsv").read_text().splitlines()]
    assert header[3:6] == ["mean", "std", "seeds"]
    assert header[8:] == ["seed 0", "seed 1"]
    assert [float(value) for value in rows[1][8:]] == pytest.approx(mapped, abs=1e-3)
    assert [row[1] for row in rows] == ["none", "map", "none, no WS"]

    status, _, errors = run(*words, "--epochs", 3)
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds a study with recipe --epochs 5 " in errors
    for split in ("train", "val"):
        other = tmp_path / split / images.name
        shutil.copytree(images, other)
        (other / split / "star" / "0.jpg").rename(other / split / "star" / "new.jpg")
        status, _, errors = run("--data", other, *words[2:])
        assert status == 2
        assert "holds a study with images" in errors
    # Another study is at work in the folder.
    with holding(out, seconds=99) as process:
        status, _, errors = run(*words)
        process.kill()
    assert status == 2
    assert f"--out: process {process.pid}" in errors
    assert (out / "results.md").read_text() == first
    # Of rates that were not all tried, none is the best.
    shutil.rmtree(out / "resnet18" / "none-no-WS" / "lr1e+09-seed1000")
    assert "| no run | none |" in run("--out", out)[1]


def test_other_settings_are_refused_where_a_run_has_begun(run, images, tmp_path):
    words = ["--data", images, "--out", tmp_path / "study", *OPTIONS]
    for name in ("checkpoint.pth.tar", "diverged.txt", "log.txt"):
        shutil.rmtree(tmp_path / "study", ignore_errors=True)
        folder = tmp_path / "study" / "l_resnet18" / "none" / "lr0.005-seed1000"
        folder.mkdir(parents=True)
        (folder / name).write_text("")
        shutil.copy(STORED / "study.json", tmp_path / "study")
        status, _, errors = run(*words)
        assert (status, errors.count("\n")) == (2, 1)
        assert "holds a study with data" in errors


def test_a_failure_among_the_rates_ends_the_study(run, images, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(images, data)
    image = data / "train" / "star" / "0.jpg"
    contents = image.read_bytes()
    image.write_bytes(b"")
    words = ["--data", data, "--out", tmp_path / "study", "--seeds", 2, "--rates", 0.001, *OPTIONS, "--epochs", 1]
    status, text, errors = run(*words)
    assert status == 1
    assert errors.count("can't decode the image") == 2
    assert "run " not in text.replace("no run", "")
    image.write_bytes(contents)
    # Nothing was measured, so the same folder takes other settings.
    status, text, errors = run(*words, "--epochs", 2)
    assert (status, errors) == (0, "")
    assert "run 6/6" in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--out", "mine", "--data", "images"], "--out: mine holds something else than a study"),
        (["--out", "new", "--data", "images", "--", "--seed", "3"], "--seed: it is the study's to set"),
        (["--out", "new", "--data", "images", "--", "--no-standardize"], "--standardize: it is the study's to set"),
        (["--out", "new", "--data", "images", "--", "-c", "mine"], "--checkpoint: it is the study's to set"),
        (["--out", "new", "--data", "images", "--", "--overwrite"], "--overwrite: it is the study's to set"),
        (["--out", "new", "--data", "images", "--rates", "0.1", "0.10"], "--rates: give different rates"),
        (["--out", "listed"], "--out: listed/study.json is damaged"),
        (["--out", "new"], "--out: new holds no study; give --data to make one"),
        (["--out", "new", "--data", "nowhere"], "nowhere/train"),
        (["--out", "damaged"], "--out: damaged/study.json is damaged"),
        (["--out", "damaged", "--seeds", "1"], "--seeds: 1 is out of bounds"),
        (["--out", "empty", "--data", "images"], "--out: empty/study.json is damaged"),
        (["--out", "new", "--data", "images"], "--train-batch 128 x --iter-size 1: more than the 3 training images"),
        (["--out", "new", "--data", "images", *OPTIONS, "--pretrained"], "--pretrained: there are no weights for l_"),
        (["--out", "file", "--data", "images", *OPTIONS, "--train-batch", "3"], "file"),
        (["--out", "new", "--data", "images", "--", "--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), {"train": 1, "val": 1})
    wrong = json.loads((STORED / "study.json").read_text()) | {"recipe": [1]}
    for folder, contents in (("damaged", "{"), ("listed", "[]"), ("mine", ""), ("empty", json.dumps(wrong))):
        Path(folder).mkdir()
        Path(folder, "study.json" if contents else "results.md").write_text(contents)
    Path("file").write_text("")
    status, out, errors = run(*words)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert reason in errors
    assert not Path("new").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_has_saved(images, tmp_path, number):
    words = ["-m", "benchmarks.study", "--data", str(images), "--out", str(tmp_path / "study"), "--rates", "0.001"]
    process = subprocess.Popen(
        [sys.executable, *words, *OPTIONS, "--epochs", "10000"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "study" / "l_resnet18" / "none" / "lr0.001-seed1000" / "log.txt"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert errors.strip() == "benchmarks.study: stopped; the same command goes on"
    checkpoint = torch.load(log.with_name("checkpoint.pth.tar"), weights_only=True)
    # It ended with the step and saved; it was not killed.
    assert 0 < checkpoint["epoch"] < 10000


def test_the_stored_study_gives_the_stored_tables(tmp_path, monkeypatch, capsys):
    shutil.copytree(STORED, tmp_path / "study")
    for name in ("results.md", "results.tsv", "results.png"):
        os.unlink(tmp_path / "study" / name)
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path / "study")])
    assert study.main() == 0
    assert capsys.readouterr().out == (STORED / "results.md").read_text()
    for name in ("results.md", "results.tsv"):
        assert (tmp_path / "study" / name).read_text() == (STORED / name).read_text()
    settings = json.loads((STORED / "study.json").read_text())
    runs = settings["seeds"] * sum(map(len, study.NETWORKS.values())) + 2 * len(settings["rates"])
    assert len(list(STORED.rglob("log.txt"))) == runs
    rows = [line for line in (STORED / "results.md").read_text().splitlines() if " of 5 | " in line]
    assert len(rows) == sum(map(len, study.NETWORKS.values()))
    assert all(row in (ROOT / "README.md").read_text() for row in rows)


@pytest.mark.parametrize("formulation", ["channel", "paper"])
def test_excited_networks_learned_the_stored_data(formulation):
    place = {"channel": "channel-gate-map", "paper": "location-gate-map"}[formulation]
    logs = list((STORED / "l_resnet18" / place).glob("*/log.txt"))
    assert len(logs) == 5
    assert min(read_log(log)[-1]["Valid Acc."] for log in logs) >= 75


def test_fashion_mnist(tmp_path, monkeypatch, capsys):
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    pixels = {
        "train": rng.integers(0, 256, (30, 28, 28), np.uint8),
        "t10k": rng.integers(0, 256, (20, 28, 28), np.uint8),
    }
    for name, values in pixels.items():
        with gzip.open(source / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4i", 2051, *values.shape) + values.tobytes())
        with gzip.open(source / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2i", 2049, len(values)) + bytes(index % 10 for index in range(len(values))))
    out = tmp_path / "some" / "folder"
    words = ["fashion_mnist", "--source", str(source), "--out", str(out), "--per-class", "2"]
    monkeypatch.setattr(sys, "argv", words)
    fashion_mnist.main()
    files = sorted(file.relative_to(out).as_posix() for file in out.rglob("*.png"))
    assert len(files) == 20 + 20
    assert "train/Ankle boot/00019.png" in files
    assert "val/T-shirt-top/00010.png" in files
    for index, file in ((19, "train/Ankle boot/00019.png"), (9, "train/Ankle boot/00009.png")):
        with Image.open(out / file) as image:
            assert np.array_equal(np.asarray(image), pixels["train"][index])
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    for words, reason in (
        (["--out", out], f"--out: {out} exists; name another folder, or remove it"),
        (["--out", tmp_path / "new", "--source", tmp_path], f"--source: {tmp_path} doesn't hold the four files"),
        (["--out", tmp_path / "new", "--source", source], f"--source: the files in {source} are damaged"),
    ):
        if "damaged" in reason:
            for file in source.iterdir():
                file.write_bytes(file.read_bytes()[:-9])
        monkeypatch.setattr(sys, "argv", ["fashion_mnist", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            fashion_mnist.main()
        assert stop.value.code == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"benchmarks.fashion_mnist: {reason}")
        assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()
