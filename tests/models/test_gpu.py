"""All layers of a model together, as on a GPU: by Triton's kernels, which a CPU interprets, and in stacks."""

import contextlib
import copy
import functools
import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from models import excitation, layers, stacked
from models.excitation import EXCITATIONS, ChannelGate
from models.fused import Layer
from models.layers import Conv1d, Conv2d, Conv3d, excited_once

triton = pytest.importorskip("triton")
gpu = pytest.importorskip("models.gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
# in_channels, out_channels, kernel, groups, layout
SHAPES = [(10, 6, 1, 1, CONTIGUOUS), (3, 2, 3, 1, CONTIGUOUS), (16, 8, 2, 8, LAST), (3, 2, 3, 1, LAST)]
BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6}  # of the norm of a difference, relative to the norm
QUICK = [("we", True)]  # the interpreter takes its time
SETTINGS = [
    pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow)
    for one in itertools.product(EXCITATIONS, (True, False))
    if one != ("none", False)
]


# Of float64 since Triton 3.5 (torch 2.9); with NumPy 2.4 since 3.7.
NEEDED = "3.7" if np.lib.NumpyVersion(np.__version__) >= "2.4.0" else "3.5"
CAN_INTERPRET = tuple(map(int, triton.__version__.split(".")[:2])) >= tuple(map(int, NEEDED.split(".")))
skipped = pytest.mark.skipif(not CAN_INTERPRET and DEVICE == "cpu", reason=f"Triton's interpreter before {NEEDED}")


@pytest.fixture(params=[stacked, pytest.param(gpu, marks=skipped)], ids=["stacked", "kernels"])
def form(request, monkeypatch):
    """Each of the two, as if on a GPU; programs take so little at once that these small layers have several."""
    monkeypatch.setattr(excitation, "GATE_REDUCTION", 2)
    if DEVICE == "cpu":  # a GPU's smallest matrices are of 16 rows
        monkeypatch.setattr(gpu, "BLOCK", 8)
        for name in ("FEATURE_TILES", "LAYER_TILES"):
            monkeypatch.setattr(gpu, name, {kind: {"M": 4, "N": 2, "K": 4} for kind in gpu.KINDS})
    monkeypatch.setattr(layers, "is_on_gpu", lambda conv: True)
    monkeypatch.setattr(layers, "gpu_forms", lambda: (request.param,))
    return request.param


def convs_of(*settings, dtype=torch.float64, shapes=SHAPES) -> list[Conv2d]:
    """Layers of these shapes."""
    torch.manual_seed(0)
    excitation, standardize, formulation = settings
    words = {"excitation": excitation, "standardize": standardize, "formulation": formulation}
    return [
        Conv2d(*sizes, groups=groups, **words).to(DEVICE, dtype, memory_format=layout)
        for *sizes, groups, layout in shapes
    ]


def as_layers(convs) -> list[Layer]:
    return [conv.layer() for conv in convs]


def expected(conv, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The excited weight and the gradients of the layer's tensors: the plain form's, in float64."""
    tensors = [tensor.detach().double().requires_grad_() for tensor in Layer(None, conv.weight, conv.gate).tensors()]
    gates = conv.gate and (lambda statistic: type(conv.gate).gates(statistic, *tensors[1:]))
    shape = tensors[0].shape if tensors[0].ndim == 4 else (*tensors[0].shape[:2], -1, 1)
    weight = excitation.excite_weight(tensors[0].reshape(shape), conv.settings, gates).reshape(tensors[0].shape)
    return [weight.detach(), *torch.autograd.grad(weight, tensors, upstream.double())]


def assert_near(ours: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    assert (ours.double() - exact).norm() <= bound * exact.norm()


def check(form, convs, unused: int | None = None) -> None:
    """Values and gradients of all layers, one of which gets no gradient."""
    assert all(map(form.can_excite, as_layers(convs)))
    weights = form.excite_weights(as_layers(convs))
    # Contiguous, as autograd may hand it over also for a weight with channels last.
    upstream = [torch.randn(conv.weight.shape, dtype=conv.weight.dtype, device=DEVICE) for conv in convs]
    used = [index for index in range(len(convs)) if index != unused]
    torch.autograd.backward([weights[index] for index in used], [upstream[index].clone() for index in used])
    for index, (conv, weight) in enumerate(zip(convs, weights, strict=True)):
        exact, *grads = expected(conv, upstream[index])
        bound = BOUNDS[weight.dtype]
        assert (weight.shape, weight.dtype) == (conv.weight.shape, conv.weight.dtype)
        assert_near(weight.detach(), exact, bound)
        for tensor, grad in zip(Layer(None, conv.weight, conv.gate).tensors(), grads, strict=True):
            if index == unused:
                assert tensor.grad is None
            else:
                assert_near(tensor.grad, grad, bound)


@pytest.mark.parametrize("halves, standardize", SETTINGS)
def test_layers_together_are_the_equations(form, formulation, halves, standardize):
    check(form, convs_of(halves, standardize, formulation), unused=1)


def test_in_float32(form, formulation):
    check(form, convs_of("we", True, formulation, dtype=torch.float32, shapes=SHAPES[1:3]))


def test_layers_of_all_kinds_at_once(form):
    """Of both types and formulations, and of one and three dimensions; in the order in which they were given."""
    several = [
        *convs_of("we", False, "paper", shapes=SHAPES[:2]),
        Conv1d(4, 6, 3).to(DEVICE).double(),
        *convs_of("we", False, "channel", shapes=SHAPES[1:2]),
        Conv3d(2, 3, 2, formulation="paper").to(DEVICE).double(),
        *convs_of("none", True, "channel", shapes=SHAPES[:1]),
        *convs_of("none", True, "channel", shapes=SHAPES[:1], dtype=torch.float32),
    ]
    check(form, several)


def test_small_weights_are_mapped_to_themselves(form):
    """atanh(q) = q + q^3 / 3 + ..., to float32's precision for each weight, however small."""
    (conv,) = convs_of("lwe", False, "channel", dtype=torch.float32, shapes=[(4, 3, 3, 1, LAST)])
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(-7, 0, conv.weight.numel(), device=DEVICE).view_as(conv.weight))
        (weight,) = form.excite_weights(as_layers([conv]))
        exact = excitation.activation_map(conv.weight.double())
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6 if form is gpu else 1e-5, atol=0)


def test_weights_of_zero_have_no_sign(form):
    """Pruned ones: the gate, whose statistic is of magnitudes, doesn't push them."""
    (conv,) = convs_of("mwe", False, "channel", shapes=[(4, 3, 3, 1, LAST)])
    with torch.no_grad():
        conv.weight[:, ::2] = 0
    check(form, [conv])


@pytest.mark.parametrize("fill", [0.0, 0.3])
def test_constant_filters_stay_finite(form, formulation, fill):
    (conv,) = convs_of("we", True, formulation, shapes=[(4, 3, 3, 1, LAST)])
    nn.init.constant_(conv.weight, fill)
    (weight,) = form.excite_weights(as_layers([conv]))
    weight.backward(torch.randn_like(weight))
    assert weight.abs().max() <= 1e-9
    assert all(tensor.grad.isfinite().all() for tensor in as_layers([conv])[0].tensors())


def test_a_filter_of_one_element_is_refused(form):
    (conv,) = convs_of("mwe", True, "channel", shapes=[(1, 3, 1, 1, LAST)])
    with pytest.raises(ValueError, match="one element"):
        form.excite_weights(as_layers([conv]))


def network(formulation: str) -> nn.Sequential:
    """With groups of several channels, so that no gradient is zero by itself."""
    torch.manual_seed(0)
    convs = [Conv2d(*sizes, bias=False, formulation=formulation) for sizes in ((3, 2, 3), (2, 2, 1), (2, 2, 1))]
    body = [layer for conv in convs for layer in (conv, nn.GroupNorm(1, 2), nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5)).to(DEVICE).double()


def gradients(model: nn.Module, around, parts: int = 2) -> list[torch.Tensor | None]:
    """Of a step of two blocks, whose gradients add up, of some micro-batches each."""
    model.zero_grad()
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    for factor in (1, 2):
        with around(model):
            for part in images.chunk(parts):
                (factor * model(part).square().sum()).backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def assert_same_step(model: nn.Module) -> None:
    ours, exact = gradients(model, excited_once), gradients(copy.deepcopy(model), contextlib.nullcontext)
    for one, other in zip(ours, exact, strict=True):
        assert (one is None) is (other is None)
        assert one is None or (one - other).norm() <= 1e-11 * other.norm()


def test_steps_are_those_without_a_block(form, formulation):
    """Whatever happened to the parameters since the step before."""
    model = network(formulation)
    with contextlib.suppress(KeyError), excited_once(model):
        raise KeyError
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.02
    model[3].weight.data, model[6].weight.data = model[6].weight.data, model[3].weight.data
    assert_same_step(model.to(memory_format=torch.channels_last))
    model[3].weight = model[6].weight
    model[0].requires_grad_(False)
    # In channels last, the backward pass of a GroupNorm behind a frozen layer crashes torch 2.8 on a CPU.
    assert_same_step(model.to(memory_format=torch.contiguous_format))


def test_writes_inside_a_block(form):
    """Another layer's, here a teacher's, does no harm; one whose gradient is wanted raises, or has it by a copy."""
    model = network("paper")
    model[6].requires_grad_(False)
    want = gradients(copy.deepcopy(model), contextlib.nullcontext)

    @contextlib.contextmanager
    def writing(model):
        with excited_once(model):
            yield
            with torch.no_grad():
                model[6].weight.mul_(1.0)

    for one, other in zip(gradients(model, writing), want, strict=True):
        assert one is None or (one - other).norm() <= 1e-11 * other.norm()
    refused = pytest.raises(RuntimeError, match="written to after it was excited")
    with refused if form is gpu else contextlib.nullcontext(), excited_once(model):
        model(torch.randn(1, 3, 5, 5, dtype=torch.float64, device=DEVICE)).sum().backward()
        with torch.no_grad():
            model[0].weight.mul_(1.1)


def test_a_gradient_that_is_also_anothers_stays(form):
    """That of what is added to an excited weight, as adapters do, lies in the same memory."""
    conv = Conv2d(4, 3, 3, formulation="paper").to(DEVICE).double()
    conv.delta = nn.Parameter(torch.zeros_like(conv.weight))
    with excited_once(conv):
        weight = conv.excited_weight().flatten(1) + conv.delta.flatten(1)
        (weight * torch.arange(weight.numel(), device=DEVICE).view_as(weight)).sum().backward()
    assert torch.equal(conv.delta.grad.flatten(), torch.arange(conv.weight.numel(), device=DEVICE).double())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_around_the_block(form, kind):
    conv = Conv2d(4, 3, 3, formulation="paper").to(DEVICE)
    exact, *grads = expected(conv, torch.ones_like(conv.weight))
    with torch.autocast(DEVICE, kind), excited_once(conv):
        assert_near(conv.excited, exact, 1e-5)
        conv.excited.sum().backward()
    assert_near(conv.weight.grad, grads[0], 1e-5)


def test_frozen_layers_keep_no_activations(form):
    """Only what a layer's own weight or gate needs: otherwise all activations and the whole backward pass are kept."""
    model = network("channel")
    model[0].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    with excited_once(model):
        assert [conv.excited.requires_grad for conv in (model[0], model[3], model[6])] == [False, True, True]
        assert not model[0](torch.randn(1, 3, 5, 5, dtype=torch.float64, device=DEVICE)).requires_grad
    with torch.no_grad(), excited_once(model):
        assert [conv.excited.requires_grad for conv in (model[0], model[3], model[6])] == [False, True, True]


class OwnGate(ChannelGate):
    """As a researcher would write it: by the largest weight of each filter in place of the mean, and doubled."""

    @staticmethod
    def statistic(raw, weight):
        return raw.abs().amax((1, 2, 3))

    def forward(self, statistic):
        return 2 * super().forward(statistic)


def test_a_gate_of_ones_own_is_applied(form):
    conv = Conv2d(4, 6, 3).to(DEVICE).double()
    conv.gate = OwnGate(4, 6).to(DEVICE).double()
    features = conv.weight.abs().amax((1, 2, 3))
    gates = 2 * conv.gate.fc2(conv.gate.fc1(features / features.mean()).relu()).sigmoid()
    weight = excitation.activation_map(excitation.standardize(conv.weight) * gates[:, None, None, None])
    torch.testing.assert_close(conv.excited_weight(), weight)
    with excited_once(conv):
        torch.testing.assert_close(conv.excited, weight.detach())


def test_what_is_excited_together(monkeypatch):
    monkeypatch.setattr(gpu, "HAS_FLOAT64_PRODUCTS", True)  # as since Triton 3.5
    conv = functools.partial(Conv2d, 4, 32, 3)
    plain, own, other, hooked, transposed = (conv() for _ in range(5))
    own.gate = OwnGate(4, 32)
    other.gate.double()
    hooked.gate.fc1.register_forward_hook(lambda *_: None)
    transposed.gate.fc1.weight.data = transposed.gate.fc1.weight.data.mT.contiguous().mT
    sliced = conv()
    sliced.weight.data = torch.randn(32, 8, 3, 3)[:, ::2]
    pruned = conv()
    pruned.weight.data = pruned.weight.data[:20]
    made = {"plain": plain, "channels last": conv().to(memory_format=torch.channels_last), "double": conv().double()}
    made |= {"own gate": own, "gate of another type": other, "hook": hooked, "half": conv().bfloat16()}
    made |= {"transposed": transposed, "gaps": sliced, "pruned": pruned, "no gate": conv(excitation="none")}
    together = {
        each.__name__: [name for name, one in made.items() if each.can_excite(*as_layers([one]))]
        for each in (gpu, stacked)
    }
    assert together == {
        "models.gpu": ["plain", "channels last", "double", "no gate"],
        "models.stacked": ["plain", "channels last", "double", "transposed", "gaps", "pruned", "no gate"],
    }


def test_what_cannot_be_excited_together_is_excited_alone(form):
    model = network("channel")
    model[3].gate.fc1.register_forward_hook(lambda module, inputs, output: output)
    model[6].bfloat16()
    with excited_once(model):
        for conv in (model[0], model[3], model[6]):
            torch.testing.assert_close(conv.excited, copy.deepcopy(conv).excited_weight().detach())


def test_float64_gates_need_a_triton_that_multiplies_them(monkeypatch):
    """3.5, which came with torch 2.9; torch 2.8 has 3.4."""
    doubles = [Conv2d(4, 6, 3).double(), Conv2d(4, 6, 3, excitation="lwe").double(), Conv2d(4, 6, 3)]
    monkeypatch.setattr(gpu, "HAS_FLOAT64_PRODUCTS", False)
    assert [gpu.can_excite(layer) for layer in as_layers(doubles)] == [False, True, True]


def test_which_form_a_gpu_gets(monkeypatch):
    captures, found, usable = [False], [object()], [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[-1])
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: found[-1])
    monkeypatch.setattr(gpu, "is_usable", lambda: usable[-1])

    def chosen():
        layers._gpu_forms.cache_clear()
        return layers.gpu_forms()

    assert chosen() == (gpu, stacked)
    captures.append(True)
    assert chosen() == (stacked,)
    captures.append(False)
    usable.append(False)
    assert chosen() == (stacked,)
    usable.append(True)
    found.append(None)
    assert chosen() == (stacked,)
    layers._gpu_forms.cache_clear()


def test_what_the_kernels_refuse_is_stacked(monkeypatch):
    seen = []
    for form, name in ((gpu, "kernels"), (stacked, "stacks")):
        count = functools.partial(lambda name, layers: seen.append((name, len(layers))) or [], name)
        monkeypatch.setattr(form, "excite_weights", lambda given, count=count: count(given) or [None] * len(given))
    monkeypatch.setattr(layers, "is_on_gpu", lambda conv: True)
    monkeypatch.setattr(layers, "gpu_forms", lambda: (gpu, stacked))
    transposed = Conv2d(4, 32, 3)
    transposed.gate.fc1.weight.data = transposed.gate.fc1.weight.data.mT.contiguous().mT
    layers._excited_weights([Conv2d(4, 6, 3), transposed, Conv2d(4, 6, 3)])
    assert seen == [("kernels", 2), ("stacks", 1)]


def test_a_fake_tensor_is_nowhere():
    conv = Conv2d(4, 6, 3)
    with FakeTensorMode():
        conv.weight = nn.Parameter(torch.empty(6, 4, 3, 3, device="cuda"))
    assert conv.weight.is_cuda and not layers.is_on_gpu(conv)


def test_tiles_are_such_as_a_gpu_has():
    sizes = [
        size for tiles in (gpu.FEATURE_TILES, gpu.LAYER_TILES) for tile in tiles.values() for size in tile.values()
    ]
    assert all(size >= 16 and size.bit_count() == 1 for size in (*sizes, gpu.BLOCK))


def test_a_triton_that_does_not_work_is_told_in_one_line(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.is_usable()

    def launch(given):
        raise RuntimeError("Traceback\nFailed to find C compiler.")

    monkeypatch.setattr(gpu.kernels, "nothing", {(1,): launch})
    with pytest.warns(UserWarning, match=r"\ATriton doesn't work here, .* \(Failed to find C compiler\.\); what"):
        assert not gpu.is_usable()


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, object]]:
    """Kernels that only note their names and the device that was current."""
    calls, current = [], []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: calls.append((self.name, current[-1] if current else None))

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    for name in list(vars(gpu.kernels)):
        if hasattr(getattr(gpu.kernels, name), "run"):
            monkeypatch.setattr(gpu.kernels, name, Noted(name))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return calls


@pytest.mark.parametrize("formulation, forward, backward", [("channel", 6, 7), ("paper", 5, 6)])
def test_launches_are_few_and_on_the_device_of_the_layers(launches, formulation, forward, backward):
    """A launch goes to the device that is current, whatever its tensors are on."""
    convs = [Conv2d(4, 6, 3, formulation=formulation, device="meta") for _ in range(9)]
    weights = gpu.excite_weights(as_layers(convs))
    assert len(launches) == forward
    torch.autograd.backward(weights, [torch.empty_like(weight) for weight in weights])
    assert len(launches) == forward + backward
    assert {device for _, device in launches} == {torch.device("meta")}
    gpu.excite_weights(as_layers([Conv2d(4, 6, 3, formulation=formulation, device=place) for place in ("meta", "cpu")]))
    assert len(launches) == 3 * forward + backward  # each device has its own


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends a GPU")
def test_the_table_is_copied_from_pinned_memory(monkeypatch):
    """Or the CPU would wait for all that the GPU still has to do."""
    calls = []

    def pin_memory(table):
        return SimpleNamespace(to=lambda device, non_blocking: calls.append((device, non_blocking)))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    weight, device = torch.randn(3, 2, 3, 3), torch.device("cuda", 1)
    fake = type("Fake", (torch.Tensor,), {"device": device})
    table, columns = gpu._table(
        [(weight.as_subclass(fake),)], gpu._Gates(gpu.Form(True, None, True), [(weight,)]), [weight]
    )
    assert (table, columns, calls) == (None, 1, [(device, True)])
