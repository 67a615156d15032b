"""--visualize, as a user meets it."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import SIZES, SMALL, TINY, checkpoint
from utils.logger import COLUMNS


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("formulation", ["channel", "paper"])
def test_a_run_with_all_its_epochs(command, images, tmp_path, formulation):
    run, out = tmp_path / "run", tmp_path / "some" / "pictures"
    words = [*TINY, "-d", images, "-c", run, "--formulation", formulation, "--epochs", 3, "--keep-freq", 1]
    assert command(*words).status == 0
    # One of another network, one of another training, and one that is damaged are passed over.
    torch.save(checkpoint(run) | {"state_dict": {"a": torch.ones(1)}, "epoch": 7}, run / "other.pth.tar")
    torch.save(checkpoint(run) | {"log": [[1.0] * len(COLUMNS)], "epoch": 2}, run / "a.pth.tar")
    (run / "damaged.pth.tar").write_text("no checkpoint")
    before = {path: path.read_bytes() for path in run.iterdir()}
    result = command("--resume", run, "--visualize", out)
    assert (result.status, result.err) == (0, "")
    *read, _, _, _, _ = result.out.splitlines()
    assert read == [f"After epoch {epoch}: {run}/checkpoint.epoch{epoch}.pth.tar" for epoch in (1, 2, 3)]
    assert sorted(result.out.splitlines()[3:]) == [f"{out}/{name}" for name in names(out)]
    assert names(out) == ["filters.png", "gates.png", "history.png", "weights.png"]
    for name in names(out):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("L").getcolors()) > 100
    assert {path: path.read_bytes() for path in run.iterdir()} == before

    pictures = {path: path.read_bytes() for path in out.iterdir()}
    (out / "filters.png").unlink()
    result = command("--resume", run, "--visualize", out)
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(r"imagenet.py: --visualize: .*/weights.png exists; replace it by --overwrite, .*\n", result.err)
    assert names(out) == ["gates.png", "history.png", "weights.png"]
    assert command("--resume", run, "--visualize", out, "--overwrite").status == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == pictures
    # Of an earlier epoch, only what came before it.
    result = command("--resume", run / "checkpoint.epoch2.pth.tar", "--visualize", tmp_path / "earlier")
    assert [line for line in result.out.splitlines() if "After" in line] == read[:2]


@pytest.mark.parametrize(
    ("words", "missing", "reason"),
    [
        (["--excitation", "we"], {"history.png"}, "No history.png: "),
        (["--excitation", "lwe"], {"gates.png", "history.png"}, "No gates.png: --excitation lwe --formulation channel"),
        (["--excitation", "none"], {"gates.png", "history.png"}, "No gates.png: --excitation none"),
    ],
)
def test_what_there_is_to_draw(command, images, tmp_path, words, missing, reason):
    run, out = tmp_path / "run", tmp_path / "pictures"
    assert command(*SMALL, "-d", images, "-c", run, "--epochs", 1, *words).status == 0
    result = command("--resume", run, "--visualize", out)
    assert result.status == 0
    assert result.out.splitlines()[-1].startswith(reason)
    assert set(names(out)) == {"filters.png", "gates.png", "history.png", "weights.png"} - missing


def test_what_can_not_be_drawn(command, images, tmp_path):
    run, out = tmp_path / "run", tmp_path / "pictures"
    assert command(*SIZES, "-a", "shufflenet_v2_x0_5", "-d", images, "-c", run, "--epochs", 1, "--lr", 0).status == 0
    torch.save(checkpoint(run)["state_dict"], tmp_path / "bare.pth.tar")
    (tmp_path / "file").write_text("")
    for command_words, reason in (
        (["--resume", run, "--visualize", out], "of a network whose weights are plain"),
        (["-d", images, "--visualize", out], "--visualize: it needs --resume RUN"),
        (["--resume", run, "-e", "--visualize", out], "--visualize: it goes without --evaluate"),
        (["--resume", run, "--export", "a.pth", "--visualize", out], "--visualize: it goes without --export"),
        (["--resume", tmp_path / "bare.pth.tar", "-d", images, "--visualize", out], "of another trainer"),
    ):
        result = command(*command_words)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert reason in result.err
    assert not out.exists()
    excited = tmp_path / "excited"
    assert command(*SMALL, "-d", images, "-c", excited, "--epochs", 1, "--excitation", "none").status == 0
    result = command("--resume", excited, "--visualize", tmp_path / "file" / "pictures")
    assert result.status == 2
    assert result.err.startswith("imagenet.py: --visualize: can't write ")
