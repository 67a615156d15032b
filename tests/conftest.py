"""Fixtures that more than one test file needs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import imagenet
from tests.helpers import draw_folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """13 training and 7 validation images of two classes; not to be changed."""
    return draw_folder(tmp_path_factory.mktemp("images"), {"train": 6, "val": 3})


@pytest.fixture
def command(monkeypatch, capsys):
    """Run imagenet.py's main() with these words; gives the exit status, stdout and stderr."""

    def run(*words) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["imagenet.py", *map(str, words)])
        capsys.readouterr()
        try:
            status = imagenet.main()
        except SystemExit as exit:  # --help
            status = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run
