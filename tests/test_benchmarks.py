"""The benchmarks run, and their tables have the figures that they speak of."""

import sys

import pytest

import models
from benchmarks import excitation, memory


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def one_network(monkeypatch):
    monkeypatch.setattr(models, "EXCITED", {"l_resnet18": models.EXCITED["l_resnet18"]})


def test_memory(one_network, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--image-size", "224"])
    memory.main()
    # torchvision's ResNet-18 has 11,689,512 parameters.
    assert cells(capsys.readouterr().out.splitlines()[-1]) == ["`l_resnet18`", "11.7", "0.2", "0.2", "21"]


def test_excitation(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["excitation", "-a", "l_resnet18", "--image-size", "32", "--rounds", "1"])
    monkeypatch.setattr(excitation, "TRAINING", ((1, 2),))
    excitation.main()
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [len(row) for row in rows] == [7] * 4
    assert rows[2][0] == "training, micro-batch 1, iteration size 2"
    assert all(float(figure) > 0 for row in rows[2:] for figure in row[1:])
    assert excitation.fused.excite_weight.__module__ == "models.fused"
