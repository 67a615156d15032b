"""The study: its loop over commands, its statistics, and what is stored in the repository."""

import json
import shutil
import signal
import statistics
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import fashion_mnist, study
from tests.helpers import ROOT
from utils.errors import BadInput, NotFinite, RunFailed
from utils.logger import COLUMNS

STORED = ROOT / "benchmarks" / "fashion-mnist-10k"
OPTIONS = ["--", "--epochs", "2", "--image-size", "32", "--train-batch", "4", "--test-batch", "4"]


class Trainer:
    """Stands for imagenet.main: keeps its words, and has an accuracy that is told from seed and excitation."""

    def __init__(self):
        self.commands, self.failure, self.status = [], None, 0

    def __call__(self, words: list[str]) -> int:
        folder = Path(words[words.index("--resume" if "--resume" in words else "-c") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint.pth.tar").touch()
        self.commands.append(words)
        if self.failure is not None:
            raise self.failure
        if "lr9" in folder.name:
            raise NotFinite("step 1")
        if self.status == 0:
            seed = int(folder.name.rpartition("seed")[2])
            top1 = 50 + seed % 7 + ("lwe" in words) * 2**seed
            row = "\t".join([str(top1)] * len(COLUMNS))
            (folder / "log.txt").write_text("\n".join(["\t".join(COLUMNS), row, row]))
        return self.status


@pytest.fixture
def trainer(monkeypatch):
    """A trainer that takes no time, and a study of three variants of two networks."""
    monkeypatch.setattr(study, "VARIANTS", [study.VARIANTS[0], study.VARIANTS[2], study.VARIANTS[7]])
    trainer = Trainer()
    monkeypatch.setattr(study.imagenet, "main", trainer)
    return trainer


def run(*words) -> int:
    return study.main(list(map(str, words)))


def test_a_study(trainer, images, tmp_path, capsys):
    out = tmp_path / "study"
    words = ["--data", images, "--out", out, "--seeds", 3, "--rates", 0.001, 9, *OPTIONS]
    trainer.failure = RunFailed("no image")
    with pytest.raises(RunFailed, match=r"^l_resnet18/none/lr0.001-seed1000: no image$"):
        run(*words)
    trainer.failure = None
    assert run(*words) == 0
    commands = [" ".join(words) for words in trainer.commands]
    # The run that failed goes on; then rates, then all variants of a seed before the next seed.
    assert commands[1].startswith("--resume")
    assert len(commands) == 1 + 4 + 9
    assert [line.split("--seed ")[1].split()[0] for line in commands[-9:]] == list("000111222")
    assert all("--lr 0.001" in line for line in commands[-9:])
    text = capsys.readouterr().out
    assert "2/4  l_resnet18/none/lr9-seed1000: diverged  ETA" in text
    assert (out / "l_resnet18/none/lr9-seed1000/diverged.txt").read_text().startswith("step 1;")
    assert not list(out.rglob("*.pth.tar"))
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert table[3][:6] == ["l_resnet18, GroupNorm", "map", study.VARIANTS[1].letters, "53.33", "2.52", "3 of 3"]
    half = 4.303 * statistics.stdev([1, 2, 4]) / 3**0.5  # the quantile from a textbook
    assert table[3][6] == "+2.33"
    assert list(map(float, table[3][7].split(" to "))) == pytest.approx([7 / 3 - half, 7 / 3 + half], abs=0.01)
    assert [row[1:] for row in table[-2:]] == [["56.00", "diverged", "0.001"]] * 2
    # From the logs alone, the tables are the same; and only what is missing is made.
    shutil.rmtree(out / "l_resnet18/map/lr0.001-seed1")
    assert run("--out", out) == 0
    assert "| 2 of 3 |" in capsys.readouterr().out
    assert run(*words) == 0
    assert len(trainer.commands) == len(commands) + 1
    assert text.endswith((out / "results.md").read_text())
    with pytest.raises(BadInput, match="holds a study with seeds 3, not 5"):
        run("--data", images, "--out", out, "--rates", 0.001, 9, *OPTIONS)
    with pytest.raises(BadInput, match="--standardize: it is the study's to set"):
        run("--data", images, "--out", tmp_path / "new", "--", "--no-standardize")
    with pytest.raises(BadInput, match="holds no study"):
        run("--out", tmp_path / "new")


def test_a_stopped_run_ends_the_study(trainer, images, tmp_path, capsys):
    trainer.status = 128 + signal.SIGTERM
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        run("--data", images, "--out", tmp_path / "study", *OPTIONS)
    assert capsys.readouterr().err == "benchmarks.study: stopped; the same command goes on\n"
    assert len(trainer.commands) == 1


def test_a_rate_at_which_nothing_trains(images, tmp_path):
    """By the real trainer."""
    recipe = ["--epochs", "1", "--image-size", "32", "--train-batch", "4", "--test-batch", "4", "-j", "0"]
    one = study.Study(tmp_path, {"recipe": recipe, "rates": [0.001, 1e30]})
    study.make(one, one.rate_runs("l_resnet18"), str(images))
    assert one.rate("l_resnet18") == 0.001
    assert "Epoch 1/1" in (tmp_path / "l_resnet18/none/lr1e+30-seed1000/diverged.txt").read_text()
    assert not list(tmp_path.rglob("*.pth.tar"))


def test_the_stored_study_gives_the_stored_tables(tmp_path, capsys):
    shutil.copytree(STORED, tmp_path / "study")
    assert run("--out", tmp_path / "study") == 0
    assert capsys.readouterr().out == (STORED / "results.md").read_text()
    for name in ("results.md", "results.tsv", "study.json"):
        assert (tmp_path / "study" / name).read_bytes() == (STORED / name).read_bytes()
    settings = json.loads((STORED / "study.json").read_text())
    runs = settings["seeds"] * len(study.VARIANTS) + 2 * len(settings["rates"])
    assert len(list(STORED.rglob("log.txt"))) == runs
    rows = [line for line in (STORED / "results.md").read_text().splitlines() if " of 5 | " in line]
    assert len(rows) == len(study.VARIANTS)
    assert all(row in (ROOT / "README.md").read_text() for row in rows)


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
