"""--visualize, as a user meets it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagenet
import models
from models.inspection import inspect_layers
from tests.helpers import assert_refused, checkpoint, contents
from utils.cli.outputs import fresh_gates
from utils.runs.checkpoint import LAST


def change(run: Path, arch: str, **network) -> None:
    """Make the run's checkpoint one of another network."""
    saved = checkpoint(run)
    state = models.create(arch, num_classes=2, **network).state_dict()
    options = saved["options"] | {"arch": arch, "excitation": None} | network
    torch.save(saved | {"arch": arch, "options": options, "state_dict": state, "optimizer": {"state": {}}}, run / LAST)


def test_the_pictures_of_a_run(command, run, tmp_path, formulation):
    out = tmp_path / "some" / "pictures"
    change(run, "l_tiny", excitation="we", formulation=formulation)
    before = contents(run)
    result = command("--resume", run, "--visualize", out)
    assert (result.status, result.err) == (0, "")
    drawn = contents(out)
    assert drawn.keys() == {"gates.png", "weights.png"}
    assert sorted(result.out.splitlines()) == sorted(f"{out}/{name}" for name in drawn)
    for name in drawn:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("L").getcolors()) > 100
    assert contents(run) == before

    (out / "gates.png").unlink()
    assert_refused(command("--resume", run, "--visualize", out), f"--visualize: {out}/weights.png exists; replace it")
    assert "gates.png" not in contents(out)
    assert command("--resume", run, "--visualize", out, "--overwrite").status == 0
    assert contents(out) == drawn


def test_a_network_without_gates_has_no_picture_of_them(command, run, tmp_path):
    change(run, "l_tiny", excitation="lwe")
    assert command("--resume", run, "--visualize", tmp_path / "pictures").status == 0
    assert contents(tmp_path / "pictures").keys() == {"weights.png"}


def test_what_can_not_be_drawn(command, run, tmp_path):
    (tmp_path / "file").write_text("")
    torch.save(checkpoint(run)["state_dict"], tmp_path / "bare.pth.tar")

    def refused(file: Path, out: Path, reason: str) -> None:
        assert_refused(command("--resume", file, "--visualize", out), reason)

    refused(run, tmp_path / "file" / "pictures", "--visualize: can't write ")
    refused(tmp_path / "bare.pth.tar", tmp_path / "pictures", "of another trainer")
    change(run, "shufflenet_v2_x0_5")
    refused(run, tmp_path / "pictures", "has plain weights")
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_fresh_gates_are_those_that_a_run_of_the_seed_begins_with(run, seed):
    args = imagenet.build_parser().parse_args(["--seed", str(seed)])
    for name, value in (checkpoint(run)["options"] | {"seed": seed}).items():
        setattr(args, name, value)
    begun = [layer.gates for layer in inspect_layers(imagenet.create_model(args, ["ring", "target"], None))]
    assert all(map(np.array_equal, begun, fresh_gates(args, checkpoint(run))))
