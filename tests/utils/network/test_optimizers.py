"""Steps that are skipped, by optimizers of any kind."""

import pytest
import torch

from utils.network.optimizers import step_if

KINDS = [(torch.optim.SGD, {"fused": True}), (torch.optim.AdamW, {"fused": True}), (torch.optim.RMSprop, {}),
    (torch.optim.SGD, {"foreach": True})]  # fmt: skip


@pytest.mark.parametrize("kind, options", KINDS)
def test_a_step_is_skipped_if_it_is_not_finite(kind, options):
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    one, other = (kind([weight], lr=0.1, **options) for weight in weights)
    for scale, is_finite in ((1.0, True), (float("inf"), False), (2.0, True)):
        for weight in weights:
            weight.grad = scale * torch.arange(1.0, 4)
        step_if(one, torch.tensor(is_finite))
        if is_finite:
            other.step()
        assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.ones(3))
