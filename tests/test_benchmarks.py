"""The benchmarks run, and their tables have the figures that they speak of."""

import argparse

import pytest

import models
from benchmarks import excitation, gpu, measure, memory, pipeline, saving


@pytest.fixture
def rows(monkeypatch, capsys):
    """Run a benchmark as briefly as may be; gives the rows of its tables without rulers."""
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)

    def run(main, *words) -> list[list[str]]:
        assert main(list(map(str, words))) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line[2:-2].split(" | ") for line in lines if line[:1] == "|" and "---" not in line]

    return run


def test_memory(rows, monkeypatch):
    monkeypatch.setattr(models, "EXCITED", {"l_resnet18": models.EXCITED["l_resnet18"]})
    # torchvision's ResNet-18 has 11,689,512 parameters.
    assert rows(memory.main, "--image-size", 224)[1:] == [["`l_resnet18`", "11.7", "0.2", "0.2", "21"]]


@pytest.fixture
def three(monkeypatch) -> list[str]:
    names = [excitation.PLAIN, "`paper`, we", "`channel`, we, each forward"]
    monkeypatch.setattr(excitation, "VARIANTS", {name: excitation.VARIANTS[name] for name in names})
    return names


def test_excitation(rows, monkeypatch, three):
    monkeypatch.setattr(excitation, "memory_table", lambda args: [[]])
    words = "-a l_tiny --image-size 32 --micro-batch 2 --iter-size 2 --seconds 0"
    _, *table = rows(excitation.main, *words.split())[:4]
    assert [row[0] for row in table] == three
    assert all(float(ratio) > 0 for row in table[1:] for ratio in row[1:])


@pytest.mark.slow
def test_peak_memory(three):
    _, *table = excitation.memory_table(argparse.Namespace(arch="l_resnet18", micro_batch=[2], image_size=32))
    assert [row[0] for row in table] == three
    assert all(int(row[1]) > 2 * 45 for row in table)  # weights of 45 MiB, and their gradients


def test_gpu(rows, monkeypatch):
    """What it measures, small and on the CPU."""
    monkeypatch.delitem(gpu.VARIANTS, gpu.BATCH_NORM)
    monkeypatch.setitem(gpu.VARIANTS, gpu.PLAIN, {"excitation": "none"})
    monkeypatch.setattr(gpu, "ARCH", "l_tiny")
    table = rows(gpu.main, "speed", "--mode", "bf16, channels last", "--micro-batch", 2, "--steps", 1, "--seconds", 0)
    assert [row[0] for row in table[1:3]] == ["`channel`", "`paper`"]
    assert table[-1][1] == "2 x 2"


@pytest.mark.slow
def test_checks_of_a_gpu(capsys):
    assert gpu.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 16
    assert all(line.startswith("ok ") for line in lines)


def test_pipeline(rows, monkeypatch):
    monkeypatch.setattr(pipeline, "IMAGES", 8)
    monkeypatch.setattr(pipeline, "NAMES", 2)
    table = rows(pipeline.main, "--workers", 1, "--seconds", 0)
    assert [row[0] for row in table if row[0].startswith("training")] == ["training, classic", "training, this"]
    assert all(float(row[1]) > 0 for row in table if row[1] != "images/s")


def test_saving(rows, tmp_path):
    _, *table = rows(saving.main, "-a", "l_tiny", "--seconds", 0, "--folder", tmp_path)
    assert [bool(row[2]) for row in table] == [False, True, False, True, False]
