"""Who may import whom in utils, as README's tree of files says."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the ground up; the first are the files that lie in utils itself.
WINGS = ("errors words files start", "machine", "images", "reports", "network", "runs", "cli", "compare prepare")
# What has to do with networks, or with their names; all else knows images, numbers and files alone.
USERS_OF_MODELS = {
    "utils/network/parallel.py",  # replicas take weights that are excited already
    "utils/network/optimizers.py",  # which parameters have weight decay
    "utils/reports/pictures.py",  # the numbers that it draws
    "utils/cli/options.py",  # the architectures that can be named
    "utils/cli/outputs.py",  # what of a network --export and --visualize write
}
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "utils").rglob("*.py"))


def imports(file: Path) -> set[str]:
    """The modules that a file imports, and whatever else it imports from packages, by their whole names."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # others stay within their package
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(name: str) -> int:
    """Of utils/WING/FILE.py or utils.WING.FILE."""
    part = name.removesuffix(".py").replace("/", ".").split(".")[1]
    (found,) = (index for index, names in enumerate(WINGS) if part in names.split())
    return found


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_wing_uses_those_below_it_alone(file):
    names = imports(file)
    used = {name for name in names if name.startswith("utils.")}
    assert "from ." not in (ROOT / file).read_text()
    if file.name != "__init__.py":
        assert {name for name in used if floor(name) > floor(str(file))} == set()
    assert any(name.split(".")[0] == "models" for name in names) == (str(file) in USERS_OF_MODELS)
    if str(file) != "utils/compare.py":  # a program, which asks another one for its options
        assert "imagenet" not in names


def test_models_use_nothing_of_utils():
    for file in (ROOT / "models").rglob("*.py"):
        assert not any(name.split(".")[0] in ("utils", "imagenet") for name in imports(file.relative_to(ROOT)))


def test_what_moves_words_and_files_about_needs_no_torch():
    for file in ("errors.py", "words.py", "files.py", "start.py", "machine/torchrun.py", "cli/arguments.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(Path("utils", file)))
