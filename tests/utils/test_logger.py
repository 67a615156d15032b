"""log.txt and its curves."""

import io

import pytest
from PIL import Image

from utils.errors import BadInput
from utils.logger import COLUMNS, Logger, draw_curves, read_log


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
