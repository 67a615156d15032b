"""The study: its runs, and the tables that are stored in the repository."""

import json
import re
import shutil
import signal
import statistics
import struct

import numpy as np
import pytest
from PIL import Image

from benchmarks import fashion_mnist, study
from tests.helpers import ROOT, copy_folder
from utils.errors import BadInput, RunFailed

STORED = ROOT / "benchmarks" / "fashion-mnist-10k"
RECIPE = ["--epochs", "1", "--image-size", "32", "--train-batch", "4", "--test-batch", "4", "-j", "0"]


def run(*words) -> int:
    return study.main(list(map(str, words)))


def test_a_study_goes_on_by_the_same_command(images, tmp_path, monkeypatch, capsys):
    """Of a rate that trains and one at which nothing does."""
    variants = [variant._replace(network="l_tiny") for variant in study.VARIANTS[:2]]
    for name, value in (("VARIANTS", variants), ("BASES", {"l_tiny": variants[0]}), ("NORMS", {"l_tiny": ""})):
        monkeypatch.setattr(study, name, value)
    out = tmp_path / "study"
    words = ["--data", images, "--out", out, "--seeds", 2, "--rates", 0.001, 1e30, "--", *RECIPE]
    with monkeypatch.context() as patch:
        patch.setattr("imagenet.train", lambda *_: (_ for _ in ()).throw(RunFailed("no image")))
        with pytest.raises(RunFailed, match=r"^l_tiny/none/lr0.001-seed1000: no image$"):
            run(*words)
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert "2/2  l_tiny/none/lr1e+30-seed1000: diverged  ETA" in text
    assert text.endswith((out / "results.md").read_text())
    assert text.count("| 2 of 2 |") == 2
    # All variants of a seed come before the next seed.
    assert re.findall(r"/4  .*-seed(\d): ", text) == list("0011")
    assert not list(out.rglob("*.pth.tar"))
    # Only what is missing is made, and the tables are made from the logs.
    shutil.rmtree(out / "l_tiny/none-no-WS/lr0.001-seed1")
    assert run("--out", out) == 0
    assert capsys.readouterr().out.count("| 1 of 2 |") == 1
    assert run(*words) == 0
    assert capsys.readouterr().out.count("  ETA ") == 1
    with pytest.raises(BadInput, match="holds a study with seeds 2, not 5"):
        run("--data", images, "--out", out, "--rates", 0.001, 1e30, "--", *RECIPE)
    with pytest.raises(BadInput, match="--standardize: it is the study's to set"):
        run("--data", images, "--out", tmp_path / "new", "--", "--no-standardize")


def test_a_stopped_run_ends_the_study(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.imagenet, "main", lambda words: 128 + signal.SIGTERM)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        run("--data", images, "--out", tmp_path / "study", "--", *RECIPE)
    assert capsys.readouterr().err == "benchmarks.study: stopped; the same command goes on\n"
    with pytest.raises(BadInput, match="holds no study"):
        run("--out", tmp_path / "new")


def test_an_interval_against_the_textbook():
    """Student's t has the quantile 2.776 at 97.5 % and four degrees of freedom."""
    stored = study.Study(STORED, json.loads((STORED / "study.json").read_text()))
    plain, bare = (list(stored.accuracies(variant).values()) for variant in study.VARIANTS[:2])
    differences = [other - one for one, other in zip(plain, bare, strict=True)]
    expected = statistics.mean(differences), 2.776 * statistics.stdev(differences) / 5**0.5
    assert stored.difference(study.VARIANTS[1]) == pytest.approx(expected, rel=1e-3)


def test_the_stored_study_gives_the_stored_tables(tmp_path, capsys):
    assert run("--out", copy_folder(STORED, tmp_path / "study")) == 0
    assert capsys.readouterr().out == (STORED / "results.md").read_text()
    for name in ("results.md", "results.tsv", "study.json"):
        assert (tmp_path / "study" / name).read_bytes() == (STORED / name).read_bytes()
    settings = json.loads((STORED / "study.json").read_text())
    runs = settings["seeds"] * len(study.VARIANTS) + 2 * len(settings["rates"])
    assert len(list(STORED.rglob("log.txt"))) == runs


def test_fashion_mnist(tmp_path):
    raw, pixels = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes())
        labels = bytes(index % 10 for index in range(30))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 30) + labels)
    out = tmp_path / "some" / "images"
    words = ["--download", str(tmp_path), "--out", str(out), "--per-class", "2"]
    assert fashion_mnist.main(words) == 0
    assert [len(list((out / split).rglob("*.png"))) for split in ("train", "val")] == [20, 30]
    assert (out / "val/T-shirt-top/00020.png").exists()
    with Image.open(out / "train/Ankle boot/00019.png") as image:
        assert np.array_equal(np.asarray(image), pixels[19])
    with pytest.raises(BadInput, match=r"--out: .* exists"):
        fashion_mnist.main(words)
