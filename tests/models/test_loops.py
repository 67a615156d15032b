"""excite(), fold() and excited_once() in training loops, tools and wrappers that others wrote.

The reference is a twin of the model that convolves with the plain form, or the same loop without the block.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from models import excitation
from models.layers import FORMULATIONS, Conv2d, excite, excited_once, fold

BOTH = pytest.mark.parametrize("formulation", FORMULATIONS)
CONTEXTS = contextlib.nullcontext, excited_once


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(count: int = 2, size: int = 7) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def network(formulation: str = "channel") -> nn.Sequential:
    """Two excited convolutions with norms and hooks to come, smooth but for the gates."""
    convs = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.GroupNorm(2, 4)
    return excite(nn.Sequential(*convs, nn.Flatten(1), nn.LazyLinear(2)), formulation=formulation).double()


def built(formulation: str = "channel") -> nn.Sequential:
    model = network(formulation)
    model(images())
    return model


class PlainForm(nn.Conv2d):
    """Convolves with the plain form of the excited weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = excitation.excite_weight(self.weight, self.steps, self.gate)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def twin(model: nn.Module) -> nn.Module:
    """A copy in the plain form."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.__class__ = PlainForm
    return model


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sin().square().sum()


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def same(ours, expected, tolerance: float = 1e-10) -> None:
    """The same tensors but for rounding, and not all zero."""
    assert any(tensor is not None and tensor.any() for tensor in expected)
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert (one - other).norm() <= tolerance * (1 + other.norm())


def compare(model: nn.Module, step: Callable[[nn.Module], None], reference: nn.Module | None = None) -> None:
    """The gradients of one step in the block are those of a copy without it."""
    reference = reference or twin(model)
    with excited_once(model):
        step(model)
    step(reference)
    same(gradients(model), gradients(reference))


# Derivatives


def scalar(model: nn.Module, batch: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The loss as a function of the parameters, and these."""
    names, values = zip(*model.named_parameters(), strict=True)
    call = lambda *parameters: functional_call(model, dict(zip(names, parameters, strict=True)), (batch,))  # noqa: E731
    return lambda *parameters: call(*parameters).sin().square().sum(), values


def hessian(function, values):
    rows = torch.autograd.functional.hessian(function, values)
    return [block for row in rows for block in row]


def hessian_vector_product(function, values):
    return torch.autograd.functional.vhp(function, values, tuple(value.cos() for value in values))[1]


def third_derivative(function, values):
    slopes = values
    for _ in range(3):
        total = sum(slope.sin().sum() for slope in slopes) if slopes is not values else function(*values)
        slopes = torch.autograd.grad(total, values, create_graph=True)
    return slopes


def gradient_penalty(function, values):
    total = function(*values)
    slopes = torch.autograd.grad(total, values, create_graph=True)
    return torch.autograd.grad(total + sum(slope.square().sum() for slope in slopes), values)


def inner_step(function, values):
    """As in MAML: through a step of gradient descent, and another one."""
    fast = values
    for _ in range(2):
        slopes = torch.autograd.grad(function(*fast), fast, create_graph=True)
        fast = tuple(value - 0.01 * slope for value, slope in zip(fast, slopes, strict=True))
    return torch.autograd.grad(function(*fast), values)


def functional_gradient(function, values):
    return torch.func.grad(function, tuple(range(len(values))))(*values)


def functional_hessian(function, values):
    rows = torch.func.hessian(function, tuple(range(len(values))))(*values)
    return [block for row in rows for block in row]


def ensemble(function, values):
    """The gradients of three models at a time."""
    stacks = tuple(torch.stack([value, value.sin(), value.cos()]) for value in values)
    return torch.func.vmap(lambda *one: functional_gradient(function, one))(*stacks)


DERIVATIVES = (hessian, hessian_vector_product, third_derivative, gradient_penalty, inner_step)
TRANSFORMS = (functional_gradient, functional_hessian, ensemble)


@BOTH
@pytest.mark.parametrize("derive", [*DERIVATIVES, *TRANSFORMS])
def test_derivatives_of_any_order(formulation, derive):
    conv = Conv2d(3, 4, 2, formulation=formulation).double()
    batch = images(size=4)
    same(derive(*scalar(conv, batch)), derive(*scalar(twin(conv), batch)))


@pytest.mark.parametrize("formulation, kind", [("channel", "mwe"), ("paper", "lwe"), ("paper", "none")])
def test_second_derivatives_by_finite_differences(formulation, kind):
    """Without the map, to whose gradient the maximum is a constant."""
    conv = Conv2d(2, 3, 2, excitation=kind, formulation=formulation).double()
    function, values = scalar(conv, images(1, 3)[:, :2])
    assert torch.autograd.gradgradcheck(function, values)


@BOTH
def test_a_gradient_penalty_on_the_images_inside_the_block(formulation):
    batch = images().requires_grad_()
    model = built(formulation)

    def step(model):
        (slope,) = torch.autograd.grad(loss(model, batch), batch, create_graph=True)
        slope.square().sum().backward()

    compare(model, step)


# What is where it can't work


@pytest.mark.parametrize("is_made_inside", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_a_step_inside_the_block_is_refused_before_a_weight_is_touched(is_made_inside, kind):
    model, batch = built(), images()
    before = copy.deepcopy(model.state_dict())
    optimizer = kind(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="steps inside"), excited_once(model):
        optimizer = kind(model.parameters(), 0.1) if is_made_inside else optimizer
        (value := loss(model, batch)).backward()
        optimizer.step(lambda: value)
    model[1].load_state_dict({name[2:]: value for name, value in before.items() if name.startswith("1.")})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.step(lambda: value)  # after the block, it may


def test_other_weights_may_step_inside_the_block():
    model, other = built(), nn.Linear(2, 1)
    other.weight.grad = torch.ones_like(other.weight)
    before = other.weight.clone()
    with excited_once(model):
        torch.optim.SGD(other.parameters(), 0.1).step()
    assert not torch.equal(other.weight, before)


@BOTH
def test_a_backward_pass_after_the_block_is_refused(formulation):
    model = built(formulation)
    with excited_once(model):
        value = loss(model, images())
    with pytest.raises(RuntimeError, match="backward pass comes after the end"):
        value.backward()
    assert model[0].weight.grad is None


@BOTH
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_closures_that_contain_the_block(formulation, kind):
    model, batch = built(formulation), images()
    states = []
    for context in CONTEXTS:
        trained = copy.deepcopy(model)
        optimizer = kind(trained.parameters(), 0.01)

        def closure(trained=trained, optimizer=optimizer, context=context):
            optimizer.zero_grad()
            with context(trained):
                (value := loss(trained, batch)).backward()
            return value

        for _ in range(2):
            optimizer.step(closure)
        states.append([*trained.parameters()])
    same(*states, tolerance=1e-7)


@BOTH
@pytest.mark.parametrize("is_optimizers", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_at_the_start_of_the_block(formulation, is_optimizers, set_to_none):
    model = built(formulation)
    reference = twin(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01, momentum=0.9) for each in (model, reference)]
    for _ in range(3):
        batches = images(), images()
        for each, optimizer, context in zip((model, reference), optimizers, CONTEXTS[::-1], strict=True):
            with context(each):
                (optimizer if is_optimizers else each).zero_grad(set_to_none)
                for batch in batches:
                    loss(each, batch).backward()
            optimizer.step()
        same(gradients(model), gradients(reference))
    same(model.parameters(), reference.parameters())


# Snapshots and changes inside the block


def through_file(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state(model: nn.Module) -> nn.Module:
    other = built()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("snapshot", [copy.deepcopy, through_file, by_state, AveragedModel])
def test_a_copy_taken_inside_the_block_excites_by_itself(snapshot):
    model, batch = built().eval(), images()
    expected = model(batch)
    names = list(model.state_dict())
    with excited_once(model):
        assert list(model.state_dict()) == names
        copied = snapshot(model).eval()
        assert torch.equal(copied(batch), expected)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), copied.parameters(), strict=True):
            other.copy_(mine.mul_(1.1).add_(0.1))
    assert torch.equal(copied(batch), model(batch))
    assert not torch.equal(copied(batch), expected)
    compare(copied.train(), lambda model: loss(model, batch).backward())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_inside_the_block(use_buffers):
    model = built()
    averages = [AveragedModel(model, use_buffers=use_buffers) for _ in CONTEXTS]
    for average, context in zip(averages, CONTEXTS, strict=True):
        for scale in (1, 2):
            with context(model), torch.no_grad():
                average.update_parameters(model)
            with torch.no_grad():
                model[0].weight.mul_(scale).div_(scale)
    same(*(average.state_dict().values() for average in averages))


@BOTH
@pytest.mark.parametrize("part", ["", "gate"])
def test_weights_loaded_inside_the_block(formulation, part):
    model, other, batch = built(formulation).eval(), built(formulation).eval(), images()
    state = {name: value + 0.1 for name, value in other.state_dict().items() if part in name}
    with excited_once(model):
        before = model(batch)
        model.load_state_dict(state, strict=not part)
        inside = model(batch)
    assert not torch.equal(before, inside)
    same([inside], [twin(model)(batch)])


@BOTH
@pytest.mark.parametrize("part", ["", "gate"])
def test_functional_call_inside_the_block(formulation, part):
    model, batch = built(formulation).eval(), images()
    given = {name: value.detach() + 0.1 for name, value in model.named_parameters() if part in name}
    with excited_once(model):
        inside = functional_call(model, given, (batch,))
    same([inside], [functional_call(twin(model), given, (batch,))])


def test_frozen_inside_the_block():
    model = built()
    with excited_once(model):
        model[0].requires_grad_(False)
        model[0].gate.requires_grad_(False)
        loss(model, images()).backward()
    assert all(parameter.grad is None for parameter in model[0].parameters())
    assert all(parameter.grad is not None for parameter in model[3].parameters())


# Wrappers and autocast


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters"])
def test_options_of_ddp_that_cant_work_are_refused(group, option):
    model = DistributedDataParallel(built(), **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True"), excited_once(model):
        pass
    assert model.module[0].excited is None


@BOTH
def test_ddp_gives_the_same_gradients(group, formulation):
    model = built(formulation)
    reference, wrapped, batches = twin(model), DistributedDataParallel(model), (images(), images())
    for _ in range(2):
        model.zero_grad()
        with excited_once(wrapped):
            with wrapped.no_sync():
                loss(wrapped, batches[0]).backward()
            loss(wrapped, batches[1]).backward()
        reference.zero_grad()
        for batch in batches:
            loss(reference, batch).backward()
        same(gradients(model), gradients(reference))


def test_ddp_broadcasts_no_excited_weights(group, monkeypatch):
    """They are the same in every process, and an inference tensor can't be broadcast."""
    model = DistributedDataParallel(built()).eval()
    with torch.inference_mode(), excited_once(model):
        model(images())
    with excited_once(model):
        model(images())
        assert all(len(buffer.shape) < 2 for buffer in model.modules_buffers)


@BOTH
@pytest.mark.parametrize("around", ["backward", "block"])
def test_autocast_around_more_than_the_forward_pass(formulation, around):
    model, batches, found = built(formulation).float(), (images().float(), images().float()), []

    def autocast(is_on):
        return torch.autocast("cpu", torch.bfloat16, enabled=is_on)

    for place, context in (("forward", contextlib.nullcontext), ("forward", excited_once), (around, excited_once)):
        model.zero_grad()
        with autocast(place == "block"), context(model):
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(model, batch).float()
                with autocast(place != "forward"):
                    value.backward()
        found.append([gradient.clone() for gradient in gradients(model)])
    same(found[1], found[0], 1e-2)  # the sum over micro-batches rounds elsewhere
    same(found[2], found[1], 1e-5)


# Conversions


def test_excite_keeps_all_that_a_layer_has():
    conv = nn.Conv2d(3, 8, 3)
    calls = []
    conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    conv.register_forward_hook(lambda _, __, output: calls.append("forward") or 2 * output)
    conv.register_full_backward_hook(lambda *_: calls.append("backward"))
    conv.register_parameter("scale", nn.Parameter(torch.ones(1)))
    conv.register_buffer("count", torch.zeros(1))
    conv.extra = "extra"
    model = nn.Sequential(conv, nn.BatchNorm2d(8)).double()
    parameters, names = dict(model.named_parameters()), list(model.state_dict())
    excite(model)
    assert model[0] is conv
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert [name for name in model.state_dict() if "gate" not in name] == names
    assert conv.extra == "extra"
    for each in (model, fold(model)):
        calls.clear()
        loss(each, images()).backward()
        assert calls == ["pre", "forward", "backward"]
        assert torch.equal(each[0](images() * 0), 2 * each[0].bias[:, None, None].expand(2, 8, 5, 5))
        assert each[0].scale.shape == each[0].count.shape == (1,)


REPARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "complex": lambda conv: conv.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
def test_excite_refuses_before_anything_changes(kind):
    model = nn.ModuleDict({"plain": nn.Conv2d(3, 4, 1), "odd": nn.Conv2d(4, 8, 3), "norm": nn.BatchNorm2d(8)})
    REPARAMETRIZATIONS[kind](model["odd"])
    before, modules = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="odd"):
        excite(model, select=lambda *_: True)
    assert list(model.state_dict()) == before
    assert [type(module) for module in model.modules()] == modules


def test_exciting_twice():
    model = built()
    state = model.state_dict()
    assert excite(model) is model
    assert all(value.data_ptr() == state[name].data_ptr() for name, value in model.state_dict().items())
    for other in ({"formulation": "paper"}, {"excitation": "lwe"}, {"standardize": False}):
        with pytest.raises(ValueError, match="0 is excited already"):
            excite(model, **other)


def test_a_frozen_layer_gets_a_frozen_gate():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model[0].requires_grad_(False)
    excite(model.eval())
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    assert all(parameter.requires_grad for parameter in model[2].parameters())
    assert not any(module.training for module in model.modules())


def test_complex_weights_are_refused():
    with pytest.raises(ValueError, match="complex"):
        Conv2d(2, 3, 2, dtype=torch.complex64)


class Scaled(Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_what_fold_refuses():
    with pytest.raises(ValueError, match=r"0 is a Scaled"):
        fold(nn.Sequential(Scaled(3, 8, 3)))
    model = nn.Sequential(Conv2d(3, 8, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="0 is reparametrized"):
        fold(model)


@BOTH
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", set(REPARAMETRIZATIONS) - {"complex"})
def test_a_layer_reparametrized_after_it_was_excited(formulation, kind):
    """Power iterations go on in training, so it evaluates."""
    model = built(formulation)
    REPARAMETRIZATIONS[kind](model[0])
    model.eval()
    with excited_once(model):
        loss(model, batch := images()).backward()
    ours = [gradient.clone() for gradient in gradients(model)]
    model.zero_grad()
    weight = excitation.excite_weight(model[0].weight, model[0].steps, model[0].gate)
    rest = twin(model[1:])
    loss(rest, F.conv2d(batch, weight, model[0].bias)).backward()
    same(ours, [*gradients(model[0]), *gradients(rest)])


# Memory


@BOTH
@pytest.mark.parametrize("shape", ["sliced", "expanded", "channels_last", "transposed"])
def test_weights_with_unusual_strides(formulation, shape):
    conv = nn.Conv2d(3, 8, 3).double()
    weight = conv.weight.detach()
    weight = {
        "sliced": torch.randn(8, 7, 3, 3).double()[:, ::2][:, :3],
        "expanded": weight[:, :1].expand(8, 3, 3, 3),
        "channels_last": weight.to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 8, 3, 3).double().transpose(0, 1),
    }[shape]
    conv.weight = nn.Parameter(weight)
    assert conv.weight.stride() == weight.stride()
    model, reference = nn.Sequential(excite(conv, formulation=formulation)), twin(nn.Sequential(conv))
    for _ in range(2):
        batch = images()
        compare(model, lambda model, batch=batch: loss(model, batch).backward(), reference)
        model.zero_grad()
        loss(model, batch).backward()
        reference.zero_grad()
        loss(reference, batch).backward()
        same(gradients(model), gradients(reference))


@BOTH
@pytest.mark.parametrize("combine", [torch.add, lambda a, b: a.sum() + b.sum()])
def test_excited_weights_that_share_a_gradient(formulation, combine):
    model = nn.ModuleList(Conv2d(4, 4, 3, formulation=formulation).double() for _ in range(2))

    def step(model):
        value = combine(*(conv.excited_weight() for conv in model))
        (value.sum() if value.requires_grad else value).backward()

    with excited_once(model):
        step(model)
    ours = [gradient and gradient.clone() if gradient is None else gradient.clone() for gradient in gradients(model)]
    model.zero_grad()
    combine(*(excitation.excite_weight(conv.weight, conv.steps, conv.gate) for conv in model)).sum().backward()
    same(ours, gradients(model))


# Tools


@BOTH
def test_tracing_and_feature_extraction(formulation):
    model = excite(torchvision.models.resnet18(), formulation=formulation).double().eval()
    batch = images(1, 32)
    with torch.no_grad():
        expected = model(batch)
        assert torch.equal(torch.fx.symbolic_trace(model)(batch), expected)
        features = create_feature_extractor(model, ["layer1", "fc"])(batch)
    assert torch.equal(features["fc"], expected)


@BOTH
@pytest.mark.parametrize("strict", [False, True])
def test_export(formulation, strict):
    model, batch = built(formulation).eval(), images()
    exported = torch.export.export(model, (batch,), strict=strict)
    same([exported.module()(batch)], [twin(model)(batch)])


@BOTH
@pytest.mark.parametrize("context", CONTEXTS)
def test_no_data(formulation, context):
    """The meta device, and a FakeTensorMode."""
    model = built(formulation)
    meta, batch = copy.deepcopy(model).to("meta"), images()
    with context(meta):
        output = meta(batch.to("meta"))
        output.sum().backward()
    assert output.device.type == "meta"
    assert output.shape == (2, 2)
    with FakeTensorMode():
        fake = network(formulation)
        with context(fake):
            assert fake(torch.empty(2, 3, 7, 7, dtype=torch.float64)).shape == (2, 2)


class LowRank(nn.Module):
    """As adapters wrap an nn.Linear."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.up(self.down(input))


@BOTH
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("change", ["wrapped", "hook", "hook of the gate"])
def test_a_changed_gate_is_called_as_a_module(formulation, context, change):
    conv = Conv2d(3, 8, 3, formulation=formulation).double()
    reference = copy.deepcopy(conv)
    for each in (conv, reference):
        if change == "wrapped":
            torch.manual_seed(1)
            each.gate.fc1 = LowRank(each.gate.fc1).double()
    if change != "wrapped":
        hooked = conv.gate.fc1 if change == "hook" else conv.gate
        hooked.register_forward_hook(lambda _, __, output: output / 2)
    batch = images()

    def gate(statistic: Tensor) -> Tensor:
        hidden = reference.gate.fc1(reference.gate.scaled(statistic)) / (2 if change == "hook" else 1)
        gates = reference.gate.broadcast(reference.gate.fc2(hidden.relu()).sigmoid())
        return gates / (2 if change == "hook of the gate" else 1)

    with context(conv):
        loss(conv, batch).backward()
    weight = excitation.excite_weight(reference.weight, reference.steps, gate)
    F.conv2d(batch, weight, reference.bias).sin().square().sum().backward()
    same(gradients(conv), gradients(reference))


@BOTH
def test_norms_are_fused_into_a_folded_network(formulation):
    model, batch = built(formulation).eval(), images()
    folded = fold(model)
    same([fuse_conv_bn_eval(*folded[:2])(batch)], [twin(model)[:2](batch)])


# Shapes of loops


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(formulation, use_reentrant):
    def step(model):
        for batch in batches:
            hidden = checkpoint(model[:3], batch, use_reentrant=use_reentrant)
            checkpoint(model[3:], hidden, use_reentrant=use_reentrant).sin().sum().backward()

    batches = [images().requires_grad_() for _ in range(2)]
    compare(built(formulation), step)


def test_blocks_in_each_other_and_a_layer_in_two_models():
    first = built()
    second = nn.Sequential(first[0], nn.Conv2d(8, 2, 1).double())
    references, batch = [twin(first), twin(second)], images()
    references[1][0] = references[0][0]
    with excited_once(first), excited_once(second):
        for model in (first, second):
            with excited_once(model):
                loss(model, batch).backward()
    for model in references:
        loss(model, batch).backward()
    for model, reference in zip((first, second), references, strict=True):
        same(gradients(model), gradients(reference))
    assert first[0].excited is None


def test_a_layer_that_is_not_used_has_no_gradient():
    model = nn.ModuleList([built(), Conv2d(3, 8, 3)])
    with excited_once(model):
        loss(model[0], images()).backward()
    assert all(gradient is None for gradient in gradients(model[1]))
    assert not any(gradient is None for gradient in gradients(model[0]))


def test_after_an_exception_the_next_block_is_right():
    model = built()
    with pytest.raises(KeyboardInterrupt), excited_once(model):
        loss(model, images()).backward()
        raise KeyboardInterrupt
    assert model[0].weight.grad is None
    model.zero_grad()
    batch = images()
    compare(model, lambda model: loss(model, batch).backward())


# Networks of others


def count(model: nn.Module) -> tuple[int, int]:
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(isinstance(conv, Conv2d) for conv in convs), len(convs)


@pytest.mark.parametrize("name, expected", [("resnet18", 20), ("efficientnet_b0", 33), ("seresnet50", 53)])
def test_which_convolutions_are_excited(name, expected):
    with torch.device("meta"):
        if name in dir(torchvision.models):
            model = getattr(torchvision.models, name)()
        else:
            model = pytest.importorskip("timm").create_model(name)
    total = count(model)[1]
    chosen, _ = count(excite(model))
    assert chosen == expected
    assert expected == total or name != "resnet18"


def test_a_network_without_norms_needs_select():
    with torch.device("meta"):
        model = pytest.importorskip("timm").create_model("nf_resnet50")
    with pytest.raises(ValueError, match="none of"):
        excite(model)
    assert count(excite(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)), select=lambda name, _: name == "1")) == (
        1,
        2,
    )
    assert isinstance(excite(nn.Conv2d(3, 8, 3)), Conv2d)


@pytest.mark.parametrize("name", ["efficientnet_b0", "regnet_y_400mf"])
def test_squeeze_excite_gates_are_no_more_saturated(name):
    shares = []
    for is_excited in (False, True):
        torch.manual_seed(0)
        model, gates = getattr(torchvision.models, name)(), []
        for module in model.modules():
            if isinstance(module, nn.Sigmoid):
                module.register_forward_hook(lambda _, __, output, gates=gates: gates.append(output.flatten()))
        model = excite(model) if is_excited else model
        with torch.no_grad():
            model(images(4, 64).float())
        values = torch.cat(gates)
        shares.append(((values < 0.01) | (values > 0.99)).double().mean().item())
    assert shares[1] == pytest.approx(shares[0], abs=1e-3)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet10t"])
def test_a_step_of_whole_networks(name):
    if name in dir(torchvision.models):
        model = getattr(torchvision.models, name)(num_classes=10)
    else:
        model = pytest.importorskip("timm").create_model(name, num_classes=10)
    batch = images(4, 32)

    def step(model):
        torch.manual_seed(0)  # for dropout
        loss(model, batch).backward()

    compare(excite(model).double(), step)
