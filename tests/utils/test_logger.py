"""log.txt and its curves."""

import pytest
from PIL import Image

from utils.errors import BadInput
from utils.logger import COLUMNS, Logger, draw_curves, read_log


def test_rows_go_and_come_back(tmp_path):
    logger = Logger(tmp_path, "title")
    logger.append(0.1, 2.3025851, 2.2, 10.5, 11.25, 50, 60, 1, 0)
    logger.append(1e-05, 2.1, 2.0, 20, 21, 70, 80, 2, 5)
    logger.write()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert (
        lines[0]
        == "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\tTrain Acc.5\tValid Acc.5\tEpoch\tBad Images"
    )
    assert lines[1] == "0.1\t2.30259\t2.2\t10.5\t11.25\t50\t60\t1\t0"
    rows = read_log(tmp_path / "log.txt")
    assert [row["Learning Rate"] for row in rows] == [0.1, 1e-05]
    again = Logger(tmp_path, "title", rows)
    again.append(1e-06, 2, 2, 20, 21, 70, 80, 3, 0)
    again.write()
    assert (tmp_path / "log.txt").read_text().splitlines()[:3] == lines
    with Image.open(tmp_path / "log.png") as picture:
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
