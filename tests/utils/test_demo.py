"""The demo data: whole or not there, the same each time, and not to be told apart by colour."""

import os

import pytest
from PIL import Image

from utils import demo


def test_it_is_an_image_folder_and_the_same_each_time_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", {"train": 3, "val": 2})
    for name in ("a", "b"):
        demo.draw_demo(tmp_path / "data" / name)
    files = sorted(path.relative_to(tmp_path / "data" / "a") for path in (tmp_path / "data" / "a").rglob("*.jpg"))
    assert len(files) == 10 * (3 + 2)
    assert all((tmp_path / "data/a" / file).read_bytes() == (tmp_path / "data/b" / file).read_bytes() for file in files)
    assert len({Image.open(tmp_path / "data" / "a" / file).size for file in files}) > 25
    monkeypatch.setattr(demo, "draw", lambda name, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.draw_demo(tmp_path / "data" / "c")
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "b"]
