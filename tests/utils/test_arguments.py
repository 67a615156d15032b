"""Options that go to words and come back, and numbers with bounds."""

import pytest

import imagenet
from utils.arguments import as_words, number
from utils.errors import BadInput


def test_options_come_back_from_their_words():
    parser = imagenet.build_parser()
    words = ["-d", "a folder", "--lr", "1e-05", "--schedule", "3", "9", "--no-standardize", "--drop", "0.25"]
    args = parser.parse_args(words)
    kept = {name: value for name, value in vars(args).items() if name not in imagenet.ONCE}
    assert parser.parse_args(as_words(kept)) == args
    assert as_words({"schedule": [], "resume": None}) == ["--schedule"]


@pytest.mark.parametrize("text", ["0", "-1", "4", "x", "1.5", "nan", ""])
def test_numbers_out_of_bounds(text):
    parser = imagenet.build_parser()
    parser.add_argument("--three", type=number(int, 1, 4))
    with pytest.raises(BadInput, match="--three"):
        parser.parse_args([f"--three={text}"])
    assert parser.parse_args(["--three", "3"]).three == 3
