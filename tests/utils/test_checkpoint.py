"""Checkpoints that load as they were written, or are refused in one line."""

import pytest
import torch
from torch import nn

from utils.checkpoint import load, load_weights
from utils.errors import BadInput


def test_prefixes_and_bare_weights(tmp_path):
    state = nn.Linear(2, 3).state_dict()
    for name, contents in (
        ("bare", state),
        ("prefixed", {"state_dict": {f"module.{key}": value for key, value in state.items()}}),
    ):
        torch.save(contents, tmp_path / name)
        loaded = load(tmp_path / name)["state_dict"]
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda state: state.pop("bias"), "lacks bias"),
        (lambda state: state.update(more=torch.zeros(1)), "more"),
        (lambda state: state.update(bias=torch.zeros(4)), r"bias as \[4\], and the network \[3\]"),
    ],
)
def test_weights_that_do_not_fit(change, text, tmp_path):
    model = nn.Linear(2, 3)
    state = dict(nn.Linear(2, 3).state_dict())
    before = model.weight.clone()
    change(state)
    with pytest.raises(BadInput, match=text):
        load_weights(model, state, tmp_path / "file")
    assert torch.equal(model.weight, before)
