"""Times and lines of an epoch."""

import pytest

from utils import meters
from utils.meters import Average, Progress


def test_average():
    average = Average()
    assert average.mean == 0
    average.update(1)
    average.update(4)
    assert average.mean == 2.5


def test_data_time_and_batch_time(monkeypatch):
    now = iter([0, 10, 13, 20, 30, 31, 40, 50, 60, 70])
    monkeypatch.setattr(meters.time, "monotonic", lambda: next(now))
    progress = Progress("label", 4, 32, first=2)
    monkeypatch.setattr(progress, "_show", lambda: None)
    assert list(progress.track("ab")) == ["a", "b"]
    assert progress.done == 4
    assert progress.data_time.mean == pytest.approx((3 + 1) / 2)  # 10 to 13, and 30 to 31
    assert progress.batch_time.mean == pytest.approx((10 + 10) / 2)  # 10 to 20, and 30 to 40


def test_a_line_only_every_ten_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: clock[0])
    for _ in Progress("label", 25, 32).track(range(25)):
        clock[0] += 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25"]
    assert "batch 1.000s  32 img/s  elapsed 0:00:10  ETA 0:00:15" in lines[0]
