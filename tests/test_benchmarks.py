"""The benchmarks run, and their tables have the rows that they speak of."""

import pytest

import models
from benchmarks import excitation, gpu, measure, memory, pipeline
from utils.errors import BadInput


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


@pytest.mark.slow
def test_excitation(rows):
    words = "-a l_resnet18 --image-size 32 --micro-batch 2 --iter-size 2 --seconds 0"
    header, *table = rows(excitation.main, *words.split())
    assert header[1] == "2 x 2"
    assert [row[0] for row in table] == list(excitation.NETWORKS)
    assert all(float(row[1]) > 0 for row in table[1:])


@pytest.mark.slow
def test_gpu(rows, monkeypatch):
    monkeypatch.setattr(gpu, "ARCH", "l_resnet18")
    words = ["--micro-batch", 2, "--steps", 1, "--seconds", 0]
    table = rows(gpu.main, "speed", "--mode", "bf16, channels last", *words)
    assert table[-1][:2] == ["bf16, channels last", "2 x 2"]
    assert table[-1][2].endswith("(1.000)")


@pytest.mark.slow
def test_checks_of_a_gpu(capsys):
    assert gpu.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 21
    assert all(line.startswith("ok ") for line in lines)


@pytest.mark.slow
def test_training_from_files(rows, monkeypatch):
    monkeypatch.setattr(gpu, "ARCH", "l_tiny")
    monkeypatch.setattr(pipeline, "IMAGES", 8)
    monkeypatch.setattr(gpu, "cores", lambda: 1)
    table = rows(gpu.main, "files", "--mode", "float32", "--seconds", 0)
    assert [row[0] for row in table[1:]] == ["from memory", "from files, this", "from files, torchvision's"]
    assert table[1][2] == "1.00" and all(float(row[1]) > 0 for row in table[1:])


@pytest.mark.skipif(gpu.IS_GPU, reason="there is one")
def test_kernels_need_a_gpu():
    with pytest.raises(BadInput, match="there is no GPU here"):
        gpu.main(["kernels"])


def test_pipeline(rows, monkeypatch):
    monkeypatch.setattr(pipeline, "IMAGES", 8)
    table = rows(pipeline.main, "--seconds", 0)
    assert [row[0] for row in table if row[0].startswith("training,")][:2] == ["training, classic", "training, this"]
    assert all(float(row[1]) > 0 for row in table if row[1] not in ("images/s", "original"))
    reduced = table[table.index(["one core, images/s", "original", "--shorter 256", "ratio"]) + 1 :]
    policies = ("", ", --auto-augment trivial", ", --auto-augment rand")
    assert [row[0] for row in reduced] == ["decoding alone", *(f"training{policy}" for policy in policies)]
    assert all(float(number) > 0 for row in reduced for number in row[1:])
