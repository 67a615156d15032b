"""log.txt and its curves, and runs compared."""

import io
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image

from utils.cli.script import call
from utils.compare import compare_curves, main, read_options, spread
from utils.reports.figures import render
from utils.reports.logger import COLUMNS, Logger, draw_curves, read_log
from utils.reports.meters import Scores


def test_rows_go_and_come_back(tmp_path):
    """Of an epoch over 200 images, besides which 3 in training and 2 in validation were bad; of 1.5 GiB."""
    trained = Scores([400.0, 21, 100, 200, 3, 4], seconds=8.0)
    valid = Scores([440.0, 40, 120, 200, 2, 0], seconds=3.6)
    logger = Logger("title")
    assert logger.changes() == {}
    assert logger.append(1e-05, trained, valid, 1, 3 * 2**29) == timedelta(seconds=12)
    files = logger.changes()
    assert logger.changes() == {}
    header = (
        "Learning Rate|Train Loss|Valid Loss|Train Acc.|Valid Acc.|Train Acc.5|Valid Acc.5|Epoch|Bad Images|"
        "Skipped Steps|Seconds|Images/s|Peak GiB"
    )
    row = "1e-05|2|2.2|10.5|20|50|60|1|5|4|11.6|25|1.5"
    assert files["log.txt"].decode().replace("\t", "|").splitlines() == [header, row]
    (tmp_path / "log.txt").write_bytes(files["log.txt"])
    whole = dict(zip(header.split("|"), map(float, row.split("|")), strict=True))
    assert read_log(tmp_path / "log.txt") == [whole]
    older = [line.split("\t")[:10] for line in files["log.txt"].decode().splitlines()]
    (tmp_path / "log.txt").write_text("".join("\t".join(line) + "\n" for line in older))
    assert read_log(tmp_path / "log.txt") == [{name: whole[name] for name in older[0]}]
    with Image.open(io.BytesIO(files["log.png"])) as picture:
        assert picture.size[0] > 800


def epochs(rates: list[float]) -> list[dict[str, float]]:
    return [dict.fromkeys(COLUMNS, 1.0) | {"Epoch": n, "Learning Rate": rate} for n, rate in enumerate(rates, 1)]


def test_curves_mark_each_drop_of_the_rate():
    """And name it, if there is room."""
    figure = draw_curves(epochs([0.1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4]), "title")
    assert figure.get_suptitle() == "title; learning rate 0.1 → 0.0001"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "validation"]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["lr 0.01", "lr 0.001"]
        assert [line.get_xdata()[0] for line in axes.get_lines()[2:]] == [3.5, 5.5, 6.5]


def test_an_axis_of_one_epoch():
    for axes in draw_curves(epochs([0.1]), "title").axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_curves_of_a_rate_that_falls_all_the_time():
    figure = draw_curves(epochs([0.05, *(0.1 / n for n in range(1, 40))]), "title")
    assert figure.get_suptitle() == "title; learning rate 0.05 → 0.1 → 0.00256"
    assert [len(axes.texts) for axes in figure.axes] == [0, 0]


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e307])
@pytest.mark.filterwarnings("error")
def test_drawing_warns_of_nothing(value):
    for count in (1, 2, 300):
        rows = [row | dict.fromkeys(COLUMNS[1:3], value * (n % 2)) for n, row in enumerate(epochs([0.1] * count))]
        assert render(draw_curves(rows, "\x07 漢字 $"))


def test_each_run_has_a_curve_and_a_name():
    rows = [dict.fromkeys(COLUMNS, 1.0) | {"Epoch": n, "Valid Acc.": n} for n in range(1, 5)]
    figure = compare_curves({"a": [rows], "b": [rows[:2]], "c": [rows]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    for axes in figure.axes:
        lightness = [sum(line.get_color()[:3]) for line in axes.get_lines()[1::2]]
        assert (len(lightness), sorted(lightness)) == (3, lightness)  # told apart in grayscale


def test_the_runs_of_a_setting_have_a_mean_and_a_band():
    runs = [[row | {"Valid Acc.": value * row["Epoch"]} for row in epochs([0.1] * 3)] for value in (1.0, 2.0, 6.0)]
    figure = compare_curves({"a": runs, "b": runs[:1]})
    assert "a band from the lowest to the highest" in figure.get_suptitle()
    axes = figure.axes[1]
    assert axes.get_lines()[1].get_ydata().tolist() == [3, 6, 9]
    assert len(axes.collections) == 2  # a's, of training and of validation
    corners = axes.collections[1].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} == {(n, n * value) for n in (1, 2, 3) for value in (1, 6)}


def log(folder: Path, epochs: int, *commands: str) -> Path:
    folder.mkdir(parents=True)
    rows = [[0.1, 2, 2, 20, 30 + epoch % 3, 50, 60, epoch, 0, 0, 9, 80, 0] for epoch in range(1, epochs + 1)]
    (folder / "log.txt").write_text("".join("\t".join(map(str, row)) + "\n" for row in [COLUMNS, *rows]))
    if commands:
        (folder / "command.txt").write_text("".join(f"# as typed\nx\n# every option\n{one}\n" for one in commands))
    return folder


@pytest.fixture
def compare(capsys):
    """Run main() with these words; gives status, stdout and stderr."""
    return lambda *words: (call(main, [str(word) for word in words], "utils.compare"), *capsys.readouterr())


def test_runs_are_compared(compare, tmp_path):
    """With names that are hard to draw."""
    one, other = log(tmp_path / "runs" / "r$_$", 3), log(tmp_path / "runs" / f"$\\alpha$ {60 * 'long'}", 50)
    words = one, other / "log.txt", "--out", tmp_path / "new" / "a.PNG"
    status, text, errors = compare(*words)
    assert (status, errors) == (0, "")
    assert text.splitlines()[:2] == [
        "r$_$: 3 epochs, top-1 30.00 %, best 32.00 % after epoch 2",
        f"{other.name}/log.txt: 50 epochs, top-1 32.00 %, best 32.00 % after epoch 2",
    ]
    with Image.open(words[-1]) as picture:
        assert picture.size[0] > 800
    for kind, start in ((".pdf", b"%PDF-"), (".svg", b"<?xml")):
        file = tmp_path / f"curves{kind}"
        assert compare(*words[:3], file)[0] == 0
        assert file.read_bytes().startswith(start)
    assert compare(*words)[2].startswith(f"utils.compare: --out: {words[-1]} exists; ")
    assert compare(*words, "--overwrite")[0] == 0


def test_the_deviation_of_seeds_is_that_of_a_sample():
    """Of 1, 2 and 6 the mean is 3, and the squares sum to 14, over two."""
    assert spread([1.0, 2.0, 6.0]) == "3.00 ± 2.65"
    assert spread([1.5]) == "1.50"


def test_the_options_of_a_run(tmp_path):
    """Are what its last command says, and what only the first one does, but not where it lies."""
    first = "python imagenet.py --data='my images' --lr=0.1 --train-batch=256 --test-batch=200 --schedule 30 60 "
    first += "--standardize --init=a.pth --start-epoch=0"
    second = "torchrun --nproc-per-node 2 ./imagenet.py --lr=0.2 --schedule 40 --no-standardize --resume=a --workers=2"
    options = read_options(log(tmp_path / "a", 1, first, second))
    assert options == options | {
        "data": "data my images",
        "lr": "lr 0.2",
        "train-batch": "train-batch 256",
        "schedule": "schedule 40",
        "standardize": "no-standardize",
        "init": "init a.pth",
        "start-epoch": "start-epoch 0",
        "optimizer": "optimizer sgd",  # as every older run's
    }
    assert not {*options} & {"checkpoint", "resume", "workers", "test-batch"}
    assert read_options(log(tmp_path / "b", 1)) is None
    assert read_options(log(tmp_path / "c", 1, "imagenet.py --lr='0.1")) is None


def test_runs_are_named_by_what_differs(compare, tmp_path):
    """And those that differ in their seeds alone are a setting, over the epochs that they share."""
    command = "imagenet.py --lr=0.1 --excitation={} --seed={} --checkpoint={}"
    runs = [log(tmp_path / f"a{n}", n, command.format("we", n, f"a{n}")) for n in (1, 2, 4)]
    runs += [log(tmp_path / "b", 3, command.format("none", 1, "b")), log(tmp_path / "c", 2)]
    assert compare(*runs) == (
        0,
        "a1 (excitation we, seed 1): 1 epoch, top-1 31.00 %, best 31.00 % after epoch 1\n"
        "a2 (excitation we, seed 2): 2 epochs, top-1 32.00 %, best 32.00 % after epoch 2\n"
        "a4 (excitation we, seed 4): 4 epochs, top-1 31.00 %, best 32.00 % after epoch 2\n"
        "b (excitation none, seed 1): 3 epochs, top-1 30.00 %, best 32.00 % after epoch 2\n"
        "c: 2 epochs, top-1 32.00 %, best 32.00 % after epoch 2\n"
        "excitation we, mean of 3 runs: 1 epoch, top-1 31.00 ± 0.00 %, best 31.00 ± 0.00 % (± standard deviation)\n",
        "",
    )
    resumed = [command.format("we", 2, "a") + " --start-epoch=0", command.format("we", 2, "a") + " --resume=a"]
    fresh = command.format("we", 1, "b") + " --start-epoch=0"
    pair = log(tmp_path / "resumed", 2, *resumed), log(tmp_path / "fresh", 2, fresh)
    assert compare(*pair)[1].splitlines()[2].startswith("mean of 2 runs: 2 epochs")
    assert compare(*runs[1:3], "--out", tmp_path / "a.svg")[1].splitlines()[2] == (
        "mean of 2 runs: 2 epochs, top-1 32.00 ± 0.00 %, best 32.00 ± 0.00 % (± standard deviation)"
    )


REFUSALS = {
    "nowhere --out a.png": "nowhere: can't be read: No such file or directory",
    "damaged --out a.png": "damaged/log.txt: damaged, or no log of this trainer",
    "empty --out a.png": "empty/log.txt: damaged, or no log of this trainer",
    "nan --out a.png": "nan/log.txt: damaged, or no log of this trainer",
    "1e308 --out a.png": "the curves have numbers that can't be drawn",
    "1 --out a.xyz": "--out: a.xyz should end in .png, .pdf, .svg",
    "1 --out 1/log.txt/a.png": "--out: can't write 1/log.txt/a.png: Not a directory",
    "1 2": "mean of 2 runs: no epoch is in the logs of all",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_comparisons_that_are_refused(compare, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    log(tmp_path / "empty", 0)
    for value in ("1", "2", "damaged", "nan", "1e308"):
        row = "\t".join([value] * len(COLUMNS)) + "\n"
        (log(tmp_path / value, 1, "imagenet.py --seed=1") / "log.txt").write_text("\t".join(COLUMNS) + "\n" + 2 * row)
    status, out, err = compare(*words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"utils.compare: {REFUSALS[words]}")
    assert not Path("a.png").exists()
