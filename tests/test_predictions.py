"""-e --predictions: a row for each validation image."""

import csv
import os
from argparse import Namespace
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

import models
from models.layers import fold
from tests.helpers import checkpoint
from utils.images.pixels import decode, read_bytes, resized_center_crop
from utils.images.samples import Batch
from utils.network.forward import normalize
from utils.reports.predictions import Predictions

COLUMNS = ["path", "class", "guess", "probability of the guess", "rank of the class"]


def table(file: Path) -> list[list[str]]:
    return list(csv.reader(file.read_text().splitlines(), delimiter="\t"))


def test_a_row_for_each_image(command, images, run, tmp_path):
    file = tmp_path / "new" / "predictions.tsv"
    ended = command("-e", "--resume", run, "--predictions", file)
    assert ended.status == 0
    model = models.create("l_tiny", num_classes=2)
    model.load_state_dict(checkpoint(run)["state_dict"])
    folder, rows = ImageFolder(images / "val"), []
    for path, target in folder.samples:
        pixels = resized_center_crop(decode(read_bytes(path)), 32)[None]
        probabilities = fold(model).eval()(normalize(pixels, torch.float32)).softmax(1)[0].tolist()
        guess, rank = probabilities.index(max(probabilities)), 1 + (probabilities[target] < max(probabilities))
        rows.append([path, folder.classes[target], folder.classes[guess], f"{max(probabilities):.4f}", str(rank)])
    assert table(file) == [COLUMNS, *rows]
    for name in folder.classes:
        hits = [row[1] == row[2] for row in rows if row[1] == name]
        assert f"  {name}: top-1 {100 * sum(hits) / len(hits):.2f} over {len(hits)} images\n" in ended.out
    assert command("-e", "--resume", run, "--predictions", file).err.count("--overwrite") == 1
    assert "it needs -e" in command("--resume", run, "--epochs", 3, "--predictions", tmp_path / "other").err


def test_a_wrong_guess_is_never_of_the_first_rank(tmp_path):
    """Of two logits that are equal, the guess is one, and the class the other."""
    data = Namespace(classes=["a", "b", "c"], images={"val": Namespace(path="{}".format)})
    predictions, logits = Predictions(data), torch.tensor([[1.0, 1.0, 0.0]])
    for index in (0, 1):
        predictions.add(Batch(logits, torch.tensor([index]), 0, [], indices=[index]), logits)
    predictions.report(tmp_path / "rows.tsv")
    assert sorted((row[1] == row[2], row[4]) for row in table(tmp_path / "rows.tsv")[1:]) == [(False, "2"), (True, "1")]


def test_a_name_that_is_no_text_is_written_as_it_is(tmp_path):
    data = Namespace(classes=["a"], images={"val": Namespace(path=lambda index: os.fsdecode(b"\xff.jpg"))})
    predictions, logits = Predictions(data), torch.ones(1, 1)
    predictions.add(Batch(logits, torch.tensor([0]), 0, [], indices=[0]), logits)
    predictions.report(tmp_path / "rows.tsv")
    assert (tmp_path / "rows.tsv").read_bytes().splitlines()[1].startswith(b"\xff.jpg\ta\t")


def test_ranks_and_the_worst_of_many_classes(tmp_path, capsys):
    """Of two images a class, the first of class c has c classes before its own; the second is right."""
    classes = [f"c{label:02}" for label in range(21)]
    data = Namespace(classes=classes, images={"val": Namespace(path="/images/a tab\t{}.jpg".format)})
    predictions = Predictions(data)
    for label in reversed(range(21)):
        logits = torch.stack([torch.arange(21.0).neg(), torch.eye(21)[label]])
        predictions.add(Batch(logits, torch.tensor([label, label]), 0, [], indices=[2 * label, 2 * label + 1]), logits)
    predictions.report(tmp_path / "rows.tsv")
    rows = table(tmp_path / "rows.tsv")[1:]
    assert [row[0] for row in rows] == [f"/images/a tab\t{index}.jpg" for index in range(42)]
    assert [int(row[4]) for row in rows] == [rank for label in range(21) for rank in (label + 1, 1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The worst of 21 classes:"
    assert lines[1:6] == [f"  c{label:02}: top-1 50.00 over 2 images" for label in range(1, 6)]
