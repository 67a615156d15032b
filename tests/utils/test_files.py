"""Files that are whole or not there."""

import os

import pytest

from utils.files import write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, lambda stream: stream.write(b"old"))

    def fail(stream):
        stream.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomically(tmp_path / "ours", lambda stream: stream.write(b""))
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
