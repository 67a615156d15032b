"""Warm-up, cosine, label smoothing, weight decay, and runs from before them."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import imagenet
import models
from tests.helpers import BATCH_NORM, EXCITED, checkpoint
from utils.images.samples import Batch
from utils.network.forward import binary_cross_entropy, classify
from utils.reports.logger import read_log
from utils.runs.checkpoint import LAST

EPOCHS, STEPS = 4, 3


def cosine(done: float, total: float) -> float:
    return (1 + math.cos(math.pi * done / total)) / 2


# Of the options, and of each of 4 x 3 steps the factor on the rate.
SCHEDULES = {
    "--schedule 1 3": [1] * 3 + [0.1] * 6 + [0.01] * 3,
    "--cosine": [cosine(step, 12) for step in range(12)],
    "--schedule 3 --warmup 1.5": [*(step / 4.5 for step in range(1, 5)), *[1] * 5, *[0.1] * 3],
    "--cosine --warmup 2": [*(step / 6 for step in range(1, 7)), *(cosine(step, 6) for step in range(6))],
    "--schedule --warmup 0.1": [1] * 12,
}


@pytest.fixture
def rates() -> Iterator[list[list[float]]]:
    """Those with which an optimizer of more than one parameter takes a step, of each of its groups."""
    seen = []

    def note(optimizer: torch.optim.Optimizer, *_) -> None:
        groups = optimizer.param_groups
        if sum(len(group["params"]) for group in groups) > 1:  # not one that is only asked what its state has
            seen.append([group["lr"] for group in groups])

    hook = register_optimizer_step_pre_hook(note)
    yield seen
    hook.remove()


def assert_rates(options: str, seen: list[list[float]], run: Path) -> None:
    """Of every step, and in the log of each epoch's first one."""
    expected = [0.004 * factor for factor in SCHEDULES[options]]
    assert seen == [[pytest.approx(rate, rel=1e-12)] * 2 for rate in expected]
    rows = read_log(run / "log.txt")
    assert [row["Learning Rate"] for row in rows] == [pytest.approx(rate, rel=1e-5) for rate in expected[::STEPS]]


@pytest.mark.parametrize("options", SCHEDULES)
def test_the_rate_of_each_step(command, images, tmp_path, rates, options):
    words = [*EXCITED, "-d", images, "--epochs", EPOCHS, *options.split(), "--lr", 0.004, "--decay", "weights"]
    assert command(*words, "-c", tmp_path).status == 0
    assert_rates(options, rates, tmp_path)


def test_the_rate_of_each_step_across_a_resumption(command, images, tmp_path, rates, stop_after):
    options = "--cosine --warmup 2"
    words = [*EXCITED, "-d", images, "--epochs", EPOCHS, *options.split(), "--lr", 0.004, "--decay", "weights"]
    stop_after(2)
    assert command(*words, "-c", tmp_path).status == 128 + signal.SIGTERM
    assert command("--resume", tmp_path).status == 0
    assert_rates(options, rates, tmp_path)


def test_schedules_that_are_refused(command, images):
    words = [*EXCITED, "-d", images, "--epochs", 3]
    assert "--schedule: it can't be combined with --cosine" in command(*words, "--cosine", "--schedule", 1).err
    assert "--warmup 3.0: nothing is left of --epochs 3" in command(*words, "--warmup", 3).err


def test_a_run_from_before_these_options_goes_on(command, run):
    saved = checkpoint(run)
    for name in ("stem", "decay", "warmup", "cosine", "label_smoothing", "optimizer", "beta2", "ema", "mixup", "bce"):
        del saved["options"][name]
    del saved["seconds"], saved["ema"]
    saved["log"] = [row[:10] for row in saved["log"]]  # as it was before the epochs' costs
    torch.save(saved, run / LAST)
    ended = command("--resume", run, "--epochs", 3, "--ema", 0.9)
    assert ended.status == 0
    # What it doesn't name had its default.
    assert "Changed: --epochs 2 -> 3, --ema 0.0 -> 0.9; the learning rate" in ended.out
    seconds = [row["Seconds"] for row in read_log(run / "log.txt")]
    assert seconds[:2] == [0, 0] and seconds[2] > 0


def test_mixed_targets():
    """The loss is of both classes by their parts; a hit is of the larger part."""
    network = nn.Sequential(nn.Flatten(1), nn.Linear(12, 5)).double()
    targets = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0.4, 0, 0, 0.6]])
    batch = Batch(torch.randn(3, 3, 2, 2, dtype=torch.float64), targets, 0, [])
    network[1].bias.data[4] = 1e6
    loss, sums, logits = classify(network, batch, torch.device("cpu"))
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(1)).sum(1).mean())
    assert (sums[1], sums[3]) == (1, 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing):
    """Of classes, smoothed as there; of parts, by the threshold of its recipes, 0.2."""
    logits, targets = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])
    wanted = BinaryCrossEntropy(smoothing)(logits, targets)
    torch.testing.assert_close(binary_cross_entropy(logits, targets, smoothing), wanted)
    share = torch.tensor([0.9, 0.1, 0.3, 0.75, 0.19, 0.81], dtype=torch.float64)[:, None]
    one_hot = F.one_hot(targets, 5)
    parts = share * one_hot + (1 - share) * one_hot.roll(1, 0)
    answers = (1 - smoothing) * (parts > 0.2).double() + smoothing / 5
    torch.testing.assert_close(binary_cross_entropy(logits, parts, smoothing), BinaryCrossEntropy()(logits, answers))
    if smoothing == 0:
        wanted = BinaryCrossEntropy(0, target_threshold=0.2)(logits, parts)
        torch.testing.assert_close(binary_cross_entropy(logits, parts), wanted)


def test_what_is_decayed():
    model = models.create("l_tiny", num_classes=3)
    weights, others = models.decay_groups(model, "weights")
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) or name == "fc"}
    assert {names[parameter] for parameter in weights["params"]} == {f"{name}.weight" for name in decayed}
    assert {*weights["params"], *others["params"]} == {*model.parameters()}
    assert others["weight_decay"] == 0
    assert [group["params"] for group in models.decay_groups(model, "all")] == [list(model.parameters())]


def test_the_cosine_has_no_drops():
    """Half way it is half the rate, whatever --schedule's default; milestones may be typed with commas."""
    args = imagenet.build_parser().parse_args(["--cosine"])
    assert imagenet.learning_rate(args, 45, 0, 10) == pytest.approx(0.05)
    assert imagenet.build_parser().parse_args(["--schedule", "30,", "60"]).schedule == [30, 60]


@pytest.mark.parametrize("words, is_bad", [("--lr 30", True), ("--lr 0.001", False), ("--lr 0.001 --bce", False)])
def test_a_bad_start_is_told_once(command, images, tmp_path, words, is_bad):
    out = command("-d", images, "-c", tmp_path / "run", *BATCH_NORM, "--epochs", 2, *words.split()).out
    assert out.count("far above that of guessing") == is_bad
