"""The faults that measure the tests: how they are read and put in, and that each place has tests."""

from pathlib import Path

from tests.faults.__main__ import FAULTS, ROOT, TESTS, Fault, near_tests, read, write

TEXT = """
== utils/a.py

silent: halves are doubled
- x / 2
+ x * 2
= tests/test_a.py::test_halves

loud: nothing is returned
-     y = 1
-     return y
+     y = 1

== utils/b.py

same: a name that nobody sees
- first
+ second
"""


def test_faults_are_read_and_put_in(tmp_path):
    halved, dropped, hidden = read(TEXT)
    assert halved == Fault(
        "utils/a.py", "silent", "halves are doubled", "x / 2", "x * 2", "tests/test_a.py::test_halves"
    )
    assert dropped == Fault("utils/a.py", "loud", "nothing is returned", "    y = 1\n    return y", "    y = 1")
    assert (hidden.file, hidden.kind) == ("utils/b.py", "same")
    assert write([halved, dropped, hidden]) == TEXT.lstrip()
    file = tmp_path / "utils" / "a.py"
    file.parent.mkdir()
    file.write_text("def f(x):\n    y = 1\n    return y\n\n\ng = lambda x: x / 2\n")
    before = file.read_text()
    assert halved.can_be_put_in(tmp_path) and dropped.can_be_put_in(tmp_path)
    with halved.put_in(tmp_path):
        assert file.read_text() == before.replace("x / 2", "x * 2")
    with dropped.put_in(tmp_path):
        assert file.read_text() == "def f(x):\n    y = 1\n\n\ng = lambda x: x / 2\n"
    assert file.read_text() == before
    file.write_text(before + "h = lambda x: x / 2\n")
    assert not halved.can_be_put_in(tmp_path)  # the text is there twice
    file.write_text("x / 3")
    assert not halved.can_be_put_in(tmp_path)
    assert not Fault("utils/a.py", "loud", "", "x", "(").can_be_put_in(tmp_path)


def test_the_noted_test_is_there(tmp_path):
    fault = Fault("utils/a.py", "loud", "", test="test_a.py::test_halves")
    assert Fault("utils/a.py", "loud", "").has_its_test(tmp_path)  # none is noted
    assert not fault.has_its_test(tmp_path)
    file = tmp_path / "test_a.py"
    file.write_text("def test_halves_of_all():\n    pass\n")
    assert not fault.has_its_test(tmp_path)
    file.write_text("def test_halves():\n    pass\n")
    assert fault.has_its_test(tmp_path)


def test_every_file_has_tests_and_every_test_is_there():
    """Those that TESTS names; and each file of the product has faults."""
    assert all((ROOT / "tests" / name).exists() for names in TESTS.values() for name in names.split())
    files = {fault.file for fault in FAULTS}
    assert all(near_tests(file, ROOT) for file in files)
    product = [
        Path("imagenet.py"),
        *(path.relative_to(ROOT) for part in ("models", "utils") for path in (ROOT / part).rglob("*.py")),
    ]
    assert files == {str(path) for path in product if path.name != "__init__.py" or path.parent.name == "models"}
