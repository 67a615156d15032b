"""The benchmarks run, and their tables have the figures that they speak of."""

import sys

import pytest

import models
from benchmarks import excitation, measure, memory, pipeline, saving, scaling


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
    words = "excitation -a l_resnet18 --image-size 64 --micro-batch 2 --iter-size 2 --seconds 0"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    names = [excitation.PLAIN, "`paper`, we", "`channel`, we, each forward"]
    monkeypatch.setattr(excitation, "VARIANTS", {name: excitation.VARIANTS[name] for name in names})
    excitation.main()
    tables = capsys.readouterr().out.strip().split("\n\n")[2:]
    times, alone, memory = [[cells(line) for line in table.splitlines()] for table in tables]
    assert times[0] == ["network", "2 x 2", "evaluation, batch 4"]
    assert [row[0] for row in times[2:]] == names
    assert all(float(ratio) > 0 for row in times[3:] for ratio in row[1:])
    assert [row[0] for row in alone[2:]] == ["`paper`, we", "reading and writing"]
    assert float(alone[2][2]) > 1
    assert [row[0] for row in memory[2:]] == names
    assert all(int(row[1]) > 40 for row in memory[2:])  # the weights alone are 45 MiB
    assert excitation.fused.excite_weight.__module__ == "models.fused"


def test_pipeline(monkeypatch, capsys):
    words = "pipeline --workers 1 --seconds 0.5 -a l_resnet18 --train-batch 2"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    monkeypatch.setattr(pipeline, "MIN_ROUNDS", 1)
    monkeypatch.setattr(pipeline, "IMAGES", 32)
    monkeypatch.setattr(pipeline, "LISTED", (3, 4))
    pipeline.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("32 JPEGs of 500 x 375 pixels and 10")  # 100 to 109 KB
    rows = [cells(line) for line in lines if line.startswith("|")]
    assert [row[0] for row in rows if row[0].startswith("training")] == ["training, classic", "training, this"]
    assert all(float(row[1]) > 0 for row in rows if row[0] == "1" or row[0].startswith(("training", "validation")))
    assert [row[0] for row in rows[-4:]] == ["12 files in 3 classes", "---", "torchvision's ImageFolder", "this"]
    assert any("% of a training step of" in line for line in lines)


def test_saving(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", f"saving -a l_resnet18 --seconds 0 --folder {tmp_path}".split())
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    saving.main()
    header, _, *rows = (cells(line) for line in capsys.readouterr().out.splitlines() if line)
    assert header == ["l_resnet18, 95 MB", "s", "over the plain one", "of a minute"]
    assert len(rows) == 5
    assert [bool(row[2]) for row in rows] == [False, True, False, True, False]
    for row in rows:
        assert float(row[3].removesuffix(" %")) == pytest.approx(100 * float(row[1]) / 60, abs=0.01)


def test_scaling(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "-a", "l_resnet18"])
    scaling.main()
    tables = [[cells(line) for line in part.splitlines()] for part in capsys.readouterr().out.strip().split("\n\n")]
    size = 4 * sum(parameter.numel() for parameter in models.create("l_resnet18").parameters())
    assert tables[0][2][1:] == [f"{2 * others * size / 1e6:.0f}" for others in (1, 3, 7)]
    assert tables[0][3][1:] == [f"{2 * share * size / 1e6:.0f}" for share in (1 / 2, 3 / 4, 7 / 8)]

    def seconds(gpus: int, alone: float, speed: float) -> float:
        return alone / gpus + scaling.data_parallel_bytes(size, gpus) / speed

    for row, speed in zip(tables[1][2:], scaling.LINKS.values(), strict=True):
        fastest = [min(range(1, 1000), key=lambda n, s=s, b=speed: seconds(n, s, b)) for s in scaling.SECONDS]
        assert row[1:] == [str(count) for count in fastest]
