"""A run's folder: one writer, whole files, and failures that lose nothing."""

import os

import pytest

from utils.errors import BadInput
from utils.run_folder import RunFolder


def test_an_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="can't write"):
        RunFolder(tmp_path / "run", None, False, False)
