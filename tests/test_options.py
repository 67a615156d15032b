"""Every option has its default and its effect, by what the network was given and by steps that are written anew."""

import copy
import math
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights

import imagenet
import models
from tests.helpers import assert_refused, checkpoint
from utils.machine.devices import default_workers
from utils.reports.logger import read_log

# As --help gives them in brackets: bearpaw's pytorch-classification, and ImageNet's usual recipe.
DEFAULTS = {
    "data": None,
    "workers": None,
    "image_size": 224,
    "val_image_size": None,
    "skip_bad_images": False,
    "demo": False,
    "arch": "l_resnet50",
    "cardinality": 32,
    "base_width": 4,
    "stem": "large",
    "zero_init_residual": None,
    "excitation": None,
    "formulation": "channel",
    "standardize": True,
    "drop": 0.0,
    "pretrained": False,
    "init": None,
    "epochs": 90,
    "start_epoch": None,
    "train_batch": 256,
    "test_batch": 200,
    "iter_size": 1,
    "lr": 0.1,
    "schedule": [30, 60],
    "gamma": 0.1,
    "cosine": False,
    "warmup": 0.0,
    "optimizer": "sgd",
    "momentum": 0.9,
    "beta2": 0.999,
    "weight_decay": 1e-4,
    "decay": "all",
    "ema": 0.0,
    "label_smoothing": 0.0,
    "bce": False,
    "auto_augment": "off",
    "random_erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "seed": 0,
    "checkpoint": None,
    "overwrite": False,
    "save_freq": 0,
    "keep_freq": 0,
    "resume": None,
    "evaluate": False,
    "predictions": None,
    "export": None,
    "visualize": None,
    "gpu_id": "0",
    "amp": "off",
    "channels_last": False,
    "sync_bn": False,
    "compile": False,
}

# Options whose effect other files test, and where.
ELSEWHERE = {
    "skip_bad_images": "test_imagenet.py test_bad_images_are_left_out_when_told",
    "demo": "test_imagenet.py test_the_demo",
    "arch": "models/test_create.py",
    "cardinality": "models/test_create.py",
    "base_width": "models/test_create.py",
    "pretrained": "test_imagenet.py test_pretrained_weights",
    "init": "test_fine_tuning.py",
    "overwrite": "utils/runs/test_run_folder.py",
    "save_freq": "test_resuming.py",
    "keep_freq": "test_resuming.py",
    "resume": "test_resuming.py",
    "evaluate": "test_imagenet.py test_a_run_and_its_evaluation",
    "predictions": "test_predictions.py",
    "export": "test_imagenet.py test_exported_weights_load_elsewhere_with_the_same_logits",
    "visualize": "test_visualize.py",
    "gpu_id": "test_gpu_paths.py",
    "sync_bn": "test_gpu_paths.py test_batchnorm_over_the_images_of_all_processes",
    "compile": "models/test_loops.py",
}

CLASSES = ("dark", "light")
WORDS = ["-a", "l_tiny", "--image-size", "32", "-j", "0", "--train-batch", "4", "--test-batch", "3", "--epochs", "1"]


def test_defaults():
    assert vars(imagenet.build_parser().parse_args([])) == DEFAULTS


def test_every_option_is_tested():
    """Here, or where the table says; a new option needs either."""
    tests = Path(__file__).parent
    for name in DEFAULTS:
        file, *functions = ELSEWHERE.get(name, "test_options.py").split()
        text = (tests / file).read_text()
        assert all(f"def {function}(" in text for function in functions), name
        words = name.replace("_", "-"), name, *{"arch": ["-a"], "evaluate": ["-e"]}.get(name, ())
        text = text.split("# Options whose effect")[-1]
        assert any(re.search(rf"(?<!\w){word}(?!\w)", text) for word in words), f"no test of --{words[0]}"


def test_every_choice_is_tested():
    """Of the options that have some; by some test, in words."""
    texts = " ".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    for action in imagenet.build_parser()._actions:
        for choice in (choice for choice in action.choices or () if choice != action.default):
            assert re.search(rf"[\"' ]{choice}[\"' ]", texts), f"no test of {action.option_strings[-1]} {choice}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six training and four validation images of each class; red tells the class, green grows from left to right."""
    place = tmp_path_factory.mktemp("colours")
    for (split, count), (label, name) in [(s, c) for s in (("train", 6), ("val", 4)) for c in enumerate(CLASSES)]:
        (place / split / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.zeros((40, 48, 3), np.uint8)
            pixels[..., 0] = 40 + 150 * label
            pixels[..., 1] = np.linspace(0, 255, 48)
            pixels[..., 2] = 10 * index
            Image.fromarray(pixels).save(place / split / name / f"{index}.png")
    return place


@pytest.fixture
def train(command, folder, tmp_path, monkeypatch):
    """Train l_tiny with some more words; gives what its layers were given and gave, and the checkpoint."""
    create = models.create

    def call(words: str = "", name: str = "run", data: Path = folder) -> SimpleNamespace:
        seen = SimpleNamespace(training=[], validation=[], conv1=[], fc=[], workers=0, first=None)

        def note(module, inputs):
            if not inputs[0].is_meta:
                (seen.training if module.training else seen.validation).append(inputs[0].clone())
                seen.workers = max(seen.workers, len(multiprocessing.active_children()))

        def note_layer(module, inputs, output):
            if not inputs[0].is_meta and module.training:
                (seen.fc if isinstance(module, nn.Linear) else seen.conv1).append((inputs[0].clone(), output))

        def recording(*arguments, **options):
            model = create(*arguments, **options)
            seen.first = copy.deepcopy(model)
            model.register_forward_pre_hook(note)
            model.conv1.register_forward_hook(note_layer)
            model.fc.register_forward_hook(note_layer)
            return model

        monkeypatch.setattr(models, "create", recording)
        ended = command(*WORDS, "-d", data, "-c", tmp_path / name, *words.split())
        assert ended.status == 0, ended.err
        seen.out = ended.out
        seen.saved = checkpoint(tmp_path / name)
        return seen

    return call


def classes_of(images: torch.Tensor) -> torch.Tensor:
    """By the mean of red, of normalized images."""
    return (images[:, 0].mean((1, 2)) > 0).long()


def light_part(images: torch.Tensor) -> torch.Tensor:
    """Of mixed images, how much of each is of the light class, by the mean of red: 40 in the dark one, 190 in it."""
    mean, std = ResNet50_Weights.IMAGENET1K_V1.transforms().mean[0], ResNet50_Weights.IMAGENET1K_V1.transforms().std[0]
    return (255 * (images[:, 0].mean((1, 2)) * std + mean) - 40) / 150


def expected(
    seen, *, rates, iter_size=1, momentum=0.9, beta2=None, decay=1e-4, spares=False, smoothing=0.0, is_binary=False
) -> dict[str, torch.Tensor]:
    """The weights after steps of SGD with momentum and an L2 penalty, in torch alone; with beta2, of AdamW."""
    model = seen.first
    decayed = [name for name, _ in model.named_parameters() if name == "fc.weight" or "conv" in name or not spares]
    decayed = [name for name in decayed if not (spares and ("gate" in name or "bn" in name))]
    buffers = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    squares = copy.deepcopy(buffers)
    for step, rate in enumerate(rates):
        model.zero_grad()
        for images in seen.training[step * iter_size : (step + 1) * iter_size]:
            parts = torch.stack([1 - light_part(images), light_part(images)], 1)
            logits = model(images)
            if is_binary:
                answers = (1 - smoothing) * (parts > 0.2) + smoothing / 2
                loss = -(answers * logits.sigmoid().log() + (1 - answers) * (-logits).sigmoid().log()).mean()
            else:
                loss = -(((1 - smoothing) * parts + smoothing / 2) * logits.log_softmax(1)).sum(1).mean()
            (loss / iter_size).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                penalty = decay * parameter if name in decayed else 0
                if beta2 is None:
                    buffers[name] = momentum * buffers[name] + parameter.grad + penalty
                    parameter -= rate * buffers[name]
                else:  # arXiv 1711.05101, algorithm 2
                    buffers[name] = momentum * buffers[name] + (1 - momentum) * parameter.grad
                    squares[name] = beta2 * squares[name] + (1 - beta2) * parameter.grad**2
                    mean = buffers[name] / (1 - momentum ** (step + 1))
                    scale = (squares[name] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
                    parameter -= rate * (mean / scale + penalty)
    return model.state_dict()


# Words of the command, and what they mean for a step. Three steps of four images make an epoch.
STEPS = {
    "": {"rates": [0.1] * 3},
    "--lr 0.02": {"rates": [0.02] * 3},
    "--lr 0.02 --momentum 0.5": {"rates": [0.02] * 3, "momentum": 0.5},
    "--lr 0.002 --optimizer adamw": {"rates": [0.002] * 3, "beta2": 0.999},
    "--lr 0.002 --optimizer adamw --momentum 0.5 --beta2 0.8 --weight-decay 30": {
        "rates": [0.002] * 3,
        "momentum": 0.5,
        "beta2": 0.8,
        "decay": 30,
    },
    "--lr 0.02 --weight-decay 0.3": {"rates": [0.02] * 3, "decay": 0.3},
    "--lr 0.02 --weight-decay 0.3 --decay weights": {"rates": [0.02] * 3, "decay": 0.3, "spares": True},
    "--lr 0.02 --label-smoothing 0.3": {"rates": [0.02] * 3, "smoothing": 0.3},
    "--lr 0.02 --bce --label-smoothing 0.3": {"rates": [0.02] * 3, "smoothing": 0.3, "is_binary": True},
    "--lr 0.02 --mixup 0.8": {"rates": [0.02] * 3},
    "--lr 0.02 --cutmix 1 --label-smoothing 0.3": {"rates": [0.02] * 3, "smoothing": 0.3},
    "--lr 0.02 --mixup 0.8 --cutmix 1 --bce": {"rates": [0.02] * 3, "is_binary": True},
    "--lr 0.02 --train-batch 2 --iter-size 3": {"rates": [0.02] * 2, "iter_size": 3},
    "--lr 0.02 --epochs 2 --warmup 1": {"rates": [0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.02, 0.02]},
    "--lr 0.02 --epochs 2 --schedule 1 --gamma 0.5": {"rates": [0.02] * 3 + [0.01] * 3},
    "--lr 0.02 --cosine": {"rates": [0.01 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]},
}


@pytest.mark.parametrize("words", STEPS)
def test_steps_are_those_of_the_textbook(train, words):
    seen = train(words)
    micro_batches = len(STEPS[words]["rates"]) * STEPS[words].get("iter_size", 1)
    assert len(seen.training) == micro_batches
    first = copy.deepcopy(seen.first.state_dict())
    weights = expected(seen, **STEPS[words])
    for name, value in seen.saved["state_dict"].items():
        moved = (weights[name] - first[name]).norm()
        assert (value - weights[name]).norm() <= 2e-3 * moved, name


def test_the_moving_average_of_the_weights(train, tmp_path):
    """Of decay 0.6, over the three steps, from the first weights on; its loss is the validation's."""
    seen = train("--lr 0.02 --ema 0.6")
    average = {name: value.clone() for name, value in seen.first.state_dict().items()}
    for steps in (1, 2, 3):
        weights = expected(
            SimpleNamespace(first=copy.deepcopy(seen.first), training=seen.training), rates=steps * [0.02]
        )
        average = {name: 0.6 * value + 0.4 * weights[name] for name, value in average.items()}
    model = copy.deepcopy(seen.first)
    for name, value in seen.saved["ema"].items():
        moved = (average[name] - model.state_dict()[name]).norm()
        assert (value - average[name]).norm() <= 2e-3 * moved, name
    model.load_state_dict(seen.saved["ema"])
    images = torch.cat(seen.validation)
    loss = nn.functional.cross_entropy(model.eval()(images), classes_of(images))
    assert read_log(tmp_path / "run" / "log.txt")[0]["Valid Loss"] == pytest.approx(loss.item(), rel=1e-3)


def test_the_validation_loss_is_that_of_the_labels(train, tmp_path):
    """Not smoothed, whatever training takes."""
    seen = train("--lr 0.02 --label-smoothing 0.3")
    model, images = seen.first.eval(), torch.cat(seen.validation)
    model.load_state_dict(seen.saved["state_dict"])
    loss = nn.functional.cross_entropy(model(images), classes_of(images))
    assert read_log(tmp_path / "run" / "log.txt")[0]["Valid Loss"] == pytest.approx(loss.item(), rel=1e-3)


def test_pixels_are_normalized_by_the_numbers_of_torchvisions_weights(train):
    """And flipped in half of the cases: green grows to the right, or to the left."""
    seen = train("--epochs 4")
    usual = ResNet50_Weights.IMAGENET1K_V1.transforms()
    images = torch.cat(seen.training)
    reds = {round((value / 255 - usual.mean[0]) / usual.std[0], 3) for value in (40, 190)}
    assert {round(value, 3) for value in images[:, 0].flatten(1).mean(1).tolist()} == reds
    blues = [(10 * index / 255 - usual.mean[2]) / usual.std[2] for index in range(6)]
    assert sorted({round(value, 3) for value in images[:, 2].flatten(1).mean(1).tolist()}) == [
        round(b, 3) for b in blues
    ]
    center = torch.cat(seen.validation)[:8, 1]  # the middle of 48 columns
    green = (127.5 / 255 - usual.mean[1]) / usual.std[1]
    assert center.mean() == pytest.approx(green, abs=0.05)
    assert (center[:, :, -1] > center[:, :, 0]).all()
    grows = images[:, 1, :, -1].mean(1) > images[:, 1, :, 0].mean(1)
    assert 0.2 < grows.float().mean() < 0.8


def test_images_have_the_size_and_batches_that_were_asked_for(train):
    """--image-size, --train-batch and --test-batch."""
    seen = train("--image-size 40 --train-batch 6 --test-batch 5")
    assert [tuple(images.shape) for images in seen.training] == 2 * [(6, 3, 40, 40)]
    assert [len(images) for images in seen.validation] == [5, 3]


def test_validation_has_a_size_of_its_own(train, command, tmp_path):
    """--val-image-size; --image-size, given to an evaluation, asks for another."""
    seen = train("--val-image-size 56")
    assert {tuple(images.shape[2:]) for images in seen.training} == {(32, 32)}
    assert {tuple(images.shape[2:]) for images in seen.validation} == {(56, 56)}
    other = train("--image-size 56", "other")
    assert torch.equal(torch.cat(other.validation), torch.cat(seen.validation))
    ended = command("--resume", tmp_path / "run", "--epochs", 2, "--val-image-size", 48)
    assert ended.status == 0 and "is of other validation images or sizes: it is reset" in ended.out
    ended = command("--resume", tmp_path / "run", "--epochs", 3, "--image-size", 40)
    assert ended.status == 0 and "it is reset" not in ended.out
    for words, size in (((), 48), (("--image-size", 40), 40), (("--image-size", 40, "--val-image-size", 44), 44)):
        other.validation.clear()
        assert command("-e", "--resume", tmp_path / "run", *words).status == 0
        assert {tuple(images.shape[2:]) for images in other.validation} == {(size, size)}


def test_a_part_is_erased(train):
    """--random-erase 0.9, to the mean colour, which the pictures have nowhere."""
    images = torch.cat(train("--random-erase 0.9 --epochs 4").training)
    shares = (images.abs() < 0.01).all(1).float().mean((1, 2))
    assert 0.75 < (shares > 0).float().mean() < 1
    assert shares[shares > 0].min() > 0.01 and shares.max() < 0.35
    assert not (torch.cat(train(name="other").training).abs() < 0.01).all(1).any()


def test_a_size_that_the_network_cant_take(command, folder, tmp_path):
    """Is refused before the first epoch: the classifier of AlexNet needs more pixels than 40."""
    words = ["-a", "alexnet", "-d", folder, "-c", tmp_path / "run", "-j", 0, "--train-batch", 4]
    ended = command(*words, "--image-size", 64, "--val-image-size", 40)
    assert_refused(ended, "--arch alexnet --image-size 64 --val-image-size 40: ")


def test_mixup_blends_and_cutmix_cuts(train):
    """Each micro-batch by other numbers, and those of another seed by others: in no two has an image the same part."""
    told = "Images are mixed: the training accuracy is that of the class with the larger part\n"
    words, smaller = "--iter-size 2 --train-batch 2 --epochs 2", []
    for seed in (0, 1):
        seen = train(f"--mixup 0.8 {words} --seed {seed}", f"run{seed}")
        assert told in seen.out
        reds = torch.cat(seen.training)[:, 0].flatten(1)
        assert (reds.amax(1) - reds.amin(1)).max() < 1e-4
        parts = torch.stack([light_part(images) for images in seen.training])
        is_mixed = (parts.sum(1) - 1).abs() < 1e-3  # of a light and a dark picture
        smaller += parts[is_mixed].amin(1).tolist()
    assert len(smaller) > 8 and len({round(part, 5) for part in smaller}) == len(smaller)
    seen = train(f"--cutmix 1 {words}")
    assert told in seen.out
    parts = light_part(torch.cat(seen.training)[:, :, ::31, ::31].flatten(2)[..., None])
    assert {round(part, 2) for part in parts.tolist()} <= {0, 0.25, 0.5, 0.75, 1}
    parts = light_part(torch.cat(seen.training))
    assert 0 < ((parts > 0.01) & (parts < 0.99)).sum() < len(parts)
    assert "mixed" not in train(name="plain").out


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_training_images_are_augmented(train, policy):
    """--auto-augment: most have another red than the two of the pictures, or more than one; validation's don't."""
    usual, seen = train(), train(f"--auto-augment {policy}", policy)
    other = [(one - two).abs().amax((1, 2, 3)) > 0.01 for one, two in zip(usual.training, seen.training, strict=True)]
    assert torch.cat(other).sum() >= 7  # of twelve
    assert torch.equal(torch.cat(usual.validation), torch.cat(seen.validation))


def test_the_seed_makes_weights_crops_and_order(train):
    """--seed 0 is the default; another one makes all of them others."""
    one, same, other = train(name="one"), train("--seed 0", "same"), train("--seed 5", "other")
    assert all(map(torch.equal, one.training, same.training))
    assert not any(map(torch.equal, one.training, other.training))
    assert not torch.equal(one.first.conv1.weight, other.first.conv1.weight)
    orders = [[tuple(image[::2, 0, 0].tolist()) for image in torch.cat(seen.training)] for seen in (one, other)]
    assert len({*orders[0], *orders[1]}) == 12 and orders[0] != orders[1]
    # A sample's own colours, whatever the order: its crop or flip is another one.
    crops = {
        seed: {tuple(image[::2, 0, 0].tolist()): image for image in torch.cat(seen.training)}
        for seed, seen in ((0, one), (5, other))
    }
    assert sum(torch.equal(crops[0][key], crops[5][key]) for key in crops[0].keys() & crops[5].keys()) <= 2


def test_an_epoch_has_crops_of_its_own_and_can_be_started_at(train):
    """--start-epoch 1 begins with what the second epoch would have been."""
    both, second = train("--epochs 2", "both"), train("--epochs 2 --start-epoch 1", "second")
    assert len(second.training) == 3
    assert all(map(torch.equal, both.training[3:], second.training))
    assert not any(map(torch.equal, both.training[:3], second.training))


def test_no_two_epochs_or_images_have_the_same_crop(train, tmp_path):
    """Of twelve equal pictures, in four epochs."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8))
    for place in (
        f"{split}/{name}/{index}.png" for split in ("train", "val") for name in CLASSES for index in range(6)
    ):
        file = tmp_path / "equal" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        noise.save(file)
    images = torch.cat(train("--epochs 4", data=tmp_path / "equal").training)
    assert len(images) == len({image.numpy().tobytes() for image in images}) == 4 * 12


def test_the_network_is_the_one_that_was_asked_for(train):
    """--stem, --excitation, --formulation and --no-standardize."""
    state = train("--stem small --formulation paper", "one").saved["state_dict"]
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["layer1.0.conv1.gate.fc1.weight"].shape == (4, 64)  # the location gate: 64 inputs, 64 // 16
    assert train(name="two").saved["state_dict"]["conv1.gate.fc1.weight"].shape == (4, 64)  # the channel gate
    plain = train("--excitation none --no-standardize", "three")
    assert not any("gate" in name for name in plain.saved["state_dict"])
    images, output = plain.conv1[0]
    raw = nn.functional.conv2d(images, plain.first.conv1.weight, None, 2, 3)
    torch.testing.assert_close(output, raw)
    standardized = train("--excitation none", "four")
    images, output = standardized.conv1[0]
    weight = standardized.first.conv1.weight
    mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(output, nn.functional.conv2d(images, (weight - mean) / (std + 1e-5), None, 2, 3))


def test_residual_blocks_begin_as_their_shortcuts(train, monkeypatch):
    """--zero-init-residual: the last norm of a block has the scale 0, and the others 1; by default of deep networks."""
    for words, deep, scale in (
        ("--zero-init-residual", (), 0),
        ("", (), 1),
        ("", ("l_tiny",), 0),
        ("--no-zero-init-residual", ("l_tiny",), 1),
    ):
        monkeypatch.setattr(models, "DEEP", deep)
        norms = train(f"{words} --lr 0 --overwrite").first.layer1[0]
        assert torch.equal(norms.bn2.weight, torch.full((64,), float(scale)))
        assert torch.equal(norms.bn1.weight, torch.ones(64))


def test_dropout_comes_before_the_classifier(train):
    """--drop 0.5: about half of its inputs are zeros, the others doubled."""
    (kept, _), *_ = train(name="one").fc
    (dropped, _), *_ = train("--drop 0.5", "two").fc
    assert (kept == 0).float().mean() < 0.1
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_type_of_the_computation(train, amp, dtype):
    """--amp, of which fp16 alone scales the loss."""
    seen = train(f"--amp {amp} --lr 0.001")
    assert {output.dtype for _, output in seen.conv1} == {dtype}
    assert (seen.saved["scaler"] != {}) is (amp == "fp16")
    assert {value.dtype for value in seen.saved["state_dict"].values()} == {torch.float32}


def test_channels_last(train):
    """--channels-last: images and weights lie so in memory."""
    for words, is_last in (("", False), ("--channels-last", True)):
        seen = train(words, f"run{words}")
        layouts = [images.is_contiguous(memory_format=torch.channels_last) for images in seen.training]
        assert layouts == 3 * [is_last]
        output = seen.conv1[0][1]
        weight = seen.saved["state_dict"]["layer1.0.conv1.weight"]
        for tensor in (output, weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last) is is_last


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_are_processes(train, workers):
    """--workers, by default 8 for a GPU and at most one for a core."""
    before = len(multiprocessing.active_children())
    assert train(f"--workers {workers}").workers - before == workers


@pytest.mark.parametrize("cores, gpus, workers", [(2, "0", 2), (64, "0", 8), (64, "0,1,2", 24)])
def test_workers_by_default(monkeypatch, cores, gpus, workers):
    monkeypatch.setattr("utils.machine.devices.cores", lambda: cores)
    assert default_workers(gpus) == workers


def test_folders_by_default(command, folder, tmp_path, monkeypatch):
    """Without --checkpoint, a run is written to checkpoints/imagenet/ARCH; --data has train and val."""
    monkeypatch.chdir(tmp_path)
    assert command(*WORDS, "--data", folder).status == 0
    assert (tmp_path / "checkpoints/imagenet/l_tiny/checkpoint.pth.tar").exists()
