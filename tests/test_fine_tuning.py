"""--init: a training that begins with the weights of another, on the command line."""

import shutil

import pytest
import torch

from tests.helpers import EXCITED, SIZES, assert_refused, checkpoint, draw_folder
from utils.reports.logger import read_log
from utils.runs.checkpoint import BEST


def test_fine_tuning_on_other_classes(command, run, tmp_path):
    """The recipe of TRAINING.md. At a rate of 0, the weights stay those that the training began with."""
    others, new = draw_folder(tmp_path / "others", {"train": 6, "val": 3}, ("checks", "disc", "grid")), tmp_path / "new"
    weights = checkpoint(run, BEST)["state_dict"]
    result = command("--init", run, "-d", others, "-c", new, *SIZES, "--epochs", 1, "--lr", 0)
    assert (result.status, result.err) == (0, "")
    assert f"Beginning with the weights of {run / BEST}\n" in result.out
    assert "The classifier fc is new" in result.out
    saved = checkpoint(new)
    assert (saved["epoch"], saved["arch"], saved["classes"]) == (1, "l_tiny", ["checks", "disc", "grid"])
    assert saved["state_dict"]["fc.weight"].shape == (3, 64)
    kept = weights.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(saved["state_dict"][name], weights[name]) for name in kept)
    assert [row["Epoch"] for row in read_log(new / "log.txt")] == [1]
    assert f"--init={run}" in (new / "command.txt").read_text()
    # It goes on without what it began with.
    shutil.rmtree(run)
    assert "at epoch 2/2, step 0/" in command("--resume", new, "--epochs", 2, "--lr", 0.002).out


def test_an_export_begins_a_training_as_the_run_ended(command, finished, images, tmp_path):
    """As plain weights, which have their excitation in them."""
    file, words = tmp_path / "plain.pth", ["--excitation", "none", "--no-standardize", "--epochs", 1, "--lr", 0]
    assert command("--resume", finished, "--export", file).status == 0
    result = command(*EXCITED, *words, "-d", images, "--init", file, "-c", tmp_path / "new")
    assert result.status == 0
    assert "is new" not in result.out
    row, old = read_log(tmp_path / "new" / "log.txt")[0], read_log(finished / "log.txt")[-1]
    assert row["Valid Loss"] == pytest.approx(old["Valid Loss"], rel=1e-4)


REFUSED = {
    "--resume x": "can't be combined with --resume",
    "--export x": "can't be combined with --export",
    "--visualize x": "can't be combined with --visualize",
    "--pretrained": "can't be combined with --pretrained",
    "-e": "can't be combined with --evaluate",
    "-a l_resnet18": "doesn't fit the architecture: it lacks layer1.1.conv1.weight",
    "--init nowhere": "there is no checkpoint nowhere",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_goes_without_weights_to_begin_with(command, finished, images, tmp_path, words):
    result = command(*SIZES, "-d", images, "-c", tmp_path / "new", "--init", finished, *words.split())
    assert_refused(result, "imagenet.py: --init: ", REFUSED[words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ([], ["--excitation", "none"], ["--formulation", "paper"]))
def test_the_network_is_that_of_the_run_unless_told(command, run, images, tmp_path, given):
    saved = checkpoint(run, BEST)
    torch.save(saved | {"options": saved["options"] | {"excitation": "mwe", "lr": 7.0}}, run / BEST)
    words = [*SIZES, "-d", images, "--epochs", 1, "--lr", 0.002, "-c", tmp_path / "new", "--init", run, *given]
    assert command(*words).status == 0
    options = checkpoint(tmp_path / "new")["options"]
    expected = {"arch": "l_tiny", "excitation": "mwe", "formulation": "channel", "lr": 0.002}
    expected |= {given[0].lstrip("-"): given[1]} if given else {}
    assert options.items() >= expected.items()
    assert "init" not in options
