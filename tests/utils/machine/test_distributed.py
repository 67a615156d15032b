"""What the processes of a run have each of what is shared out."""

import pytest

from utils.machine import torchrun
from utils.machine.distributed import share


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_parts_of_a_batch_are_the_batch(monkeypatch, processes):
    monkeypatch.setattr(torchrun, "PROCESSES", processes)
    for size in (1, 7, 8, 24):
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(torchrun, "RANK", rank)
            parts.append(share(list(range(size))))
        assert [item for part in parts for item in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) == (size % processes > 0)
