"""The study: its runs, and the tables that are stored in the repository."""

import json
import shutil

import pytest

from benchmarks import study
from tests.helpers import ROOT
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


def test_the_stored_study_gives_the_stored_tables(tmp_path, capsys):
    shutil.copytree(STORED, tmp_path / "study")
    assert run("--out", tmp_path / "study") == 0
    assert capsys.readouterr().out == (STORED / "results.md").read_text()
    for name in ("results.md", "results.tsv", "study.json"):
        assert (tmp_path / "study" / name).read_bytes() == (STORED / name).read_bytes()
    settings = json.loads((STORED / "study.json").read_text())
    runs = settings["seeds"] * len(study.VARIANTS) + 2 * len(settings["rates"])
    assert len(list(STORED.rglob("log.txt"))) == runs
