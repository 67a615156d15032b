"""log.txt and its curves."""

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from utils.errors import BadInput
from utils.logger import COLUMNS, Logger, compare_curves, draw_curves, main, read_log


def test_rows_go_and_come_back(tmp_path):
    logger = Logger("title")
    assert logger.changes() == {}
    logger.append(0.1, 2.3025851, 2.2, 10.5, 11.25, 50, 60, 1, 0, 0)
    logger.append(1e-05, 2.1, 2.0, 20, 21, 70, 80, 2, 5, 3)
    files = logger.changes()
    assert logger.changes() == {}
    lines = files["log.txt"].decode().splitlines()
    names = "Learning Rate,Train Loss,Valid Loss,Train Acc.,Valid Acc.,Train Acc.5,Valid Acc.5,Epoch,Bad Images"
    assert lines[0].split("\t") == [*names.split(","), "Skipped Steps"]
    assert lines[1] == "0.1\t2.30259\t2.2\t10.5\t11.25\t50\t60\t1\t0\t0"
    (tmp_path / "log.txt").write_bytes(files["log.txt"])
    assert [row["Learning Rate"] for row in read_log(tmp_path / "log.txt")] == [0.1, 1e-05]
    again = Logger("title")
    again.rows = logger.rows
    again.append(1e-06, 2, 2, 20, 21, 70, 80, 3, 0, 0)
    assert again.changes()["log.txt"].decode().splitlines()[:3] == lines
    with Image.open(io.BytesIO(files["log.png"])) as picture:
        assert picture.size[0] > 800


def test_curves_mark_each_drop_of_the_rate():
    rows = [dict.fromkeys(COLUMNS, 1.0) | {"Epoch": n, "Learning Rate": 0.1 ** (n // 3)} for n in range(1, 8)]
    figure = draw_curves(rows, "title")
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["lr 0.1", "lr 0.01"]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats)", "top-1 (%)"]


@pytest.mark.parametrize("text", ["", "a\tb\n1\n", "a\tb\n1\tx\n"])
def test_damaged_logs(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(BadInput, match=r"log\.txt"):
        read_log(tmp_path / "log.txt")


def log(folder: Path, epochs: int) -> Path:
    folder.mkdir(parents=True)
    logger = Logger("title")
    for epoch in range(1, epochs + 1):
        logger.append(0.1, 2, 2, 20, 30 + epoch % 3, 50, 60, epoch, 0, 0)
    (folder / "log.txt").write_bytes(logger.changes()["log.txt"])
    return folder


@pytest.fixture
def compare(monkeypatch, capsys):
    """Run main() with these words; gives status, stdout and stderr."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["logger", *map(str, words)])
        return main(), *capsys.readouterr()

    return run


def test_runs_are_compared(compare, tmp_path):
    one, other = log(tmp_path / "runs" / "one", 3), log(tmp_path / "runs" / "other", 50)
    out = tmp_path / "curves.png"
    status, text, errors = compare(one, other / "log.txt", "--out", out)
    assert (status, errors) == (0, "")
    assert text.splitlines() == [
        "one: 3 epochs, top-1 30.00 %, best 32.00 % after epoch 2",
        "other/log.txt: 50 epochs, top-1 32.00 %, best 32.00 % after epoch 2",
    ]
    with Image.open(out) as picture:
        assert picture.size[0] > 800
    before = out.read_bytes()
    assert compare(one, "--out", out)[::2] == (
        2,
        f"utils.logger: --out: {out} exists; replace it by --overwrite, or write elsewhere\n",
    )
    assert out.read_bytes() == before
    assert compare(one, "--out", out, "--overwrite")[0] == 0
    assert compare(one, "--out", tmp_path / "a" / "new" / "folder.pdf")[0] == 0
    assert out.read_bytes() != before


def test_each_run_has_a_curve_and_a_name():
    rows = [dict.fromkeys(COLUMNS, 1.0) | {"Epoch": n, "Valid Acc.": n} for n in range(1, 5)]
    figure = compare_curves({"a": rows, "b": rows[:2], "c": rows})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    for axes in figure.axes:
        assert len(axes.get_lines()) == 6
        lightness = [sum(line.get_color()[:3]) for line in axes.get_lines()[1::2]]
        assert lightness == sorted(lightness)  # told apart in grayscale


def test_names_and_numbers_that_are_hard_to_draw(compare, tmp_path):
    names = ["r$_$", "lr=$\\alpha$", os.fsdecode(b"\xff"), *(f"{'long ' * 12}{index}" for index in range(12))]
    runs = [log(tmp_path / name, 90) for name in names]
    assert compare(*runs, "--out", tmp_path / "a.SVG")[0] == 0
    (log(tmp_path / "nan", 2) / "log.txt").write_text("\t".join(COLUMNS) + "\n" + "\t".join(["nan"] * len(COLUMNS)))
    status, _, errors = compare(tmp_path / "nan", "--out", tmp_path / "b.png")
    assert (status, errors) == (2, f"utils.logger: {tmp_path}/nan/log.txt: damaged, or no log of this trainer\n")
    (log(tmp_path / "huge", 2) / "log.txt").write_text(
        "\t".join(COLUMNS) + 2 * ("\n" + "\t".join(["1e308"] * len(COLUMNS)))
    )
    status, _, errors = compare(tmp_path / "huge", "--out", tmp_path / "b.png")
    assert (status, errors.count("\n")) == (2, 1)
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere", "--out", "a.png"], "nowhere: can't be read: No such file or directory"),
        (["damaged", "--out", "a.png"], "damaged/log.txt: damaged, or no log of this trainer"),
        (["run", "--out", "a.xyz"], "--out: a.xyz should end in .png, .pdf, .svg"),
        (["run", "--out", "run/log.txt/a.png"], "--out: can't write run/log.txt/a.png: Not a directory"),
        (["run"], "the following arguments are required: --out"),
        (["--out", "a.png"], "the following arguments are required: RUN"),
    ],
)
def test_comparisons_that_are_refused(compare, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    log(tmp_path / "run", 2)
    (log(tmp_path / "damaged", 2) / "log.txt").write_text("Learning Rate\n")
    assert compare(*words) == (2, "", f"utils.logger: {reason}\n")
    assert not Path("a.png").exists()
