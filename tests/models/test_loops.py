"""excite(), fold() and excited_once() in training loops, tools and wrappers that others wrote.

The reference is a twin of the model that convolves with the plain form, or the same loop without the block.
"""

import contextlib
import copy
import functools
import io
from concurrent.futures import ThreadPoolExecutor

import onnxruntime
import pytest
import torch
import torchvision
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from models.excitation import FORMULATIONS, ChannelGate, excite_weight
from models.fused import full_precision
from models.layers import Conv2d, excite, excited_once, fold

BLOCK_OR_NOT = pytest.mark.parametrize("context", [contextlib.nullcontext, excited_once])
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:Full backward hook:UserWarning", "ignore:Complex modules:UserWarning"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(count=2, size=7):
    return torch.randn(count, 3, size, size, dtype=torch.float64)


def network(formulation="channel"):
    first, second = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()], [nn.Conv2d(8, 4, 3), nn.GroupNorm(2, 4)]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(36, 2)).double()
    return alive(excite(model, formulation=formulation, example=images(1)))


def layer(formulation="channel", **arguments):
    return alive(Conv2d(3, 4, 2, formulation=formulation, dtype=torch.float64, **arguments))


def alive(model):
    """With hidden features of the gates above zero, so that gradients pass."""
    for module in model.modules():
        if getattr(module, "gate", None) is not None:
            module.gate.fc1.bias.data.abs_()
    return model


class PlainForm(Conv2d):
    def excited_weight(self):
        return excite_weight(self.weight, self.settings, self.gate)


def twin(model):
    """A copy in the plain form."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = PlainForm if isinstance(module, Conv2d) else type(module)
    return model


def loss(model, batch):
    return model(batch).sin().square().sum()


def gradients(model):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def same(ours, expected, tolerance=1e-10):
    """The same tensors but for rounding, and not all zero."""
    ours, expected = list(ours), list(expected)
    assert any(tensor is not None and tensor.any() for tensor in expected)
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= tolerance * (1 + other.norm())


def check_step(model, step, reference):
    """The gradients of one step in the block are those of the reference without it."""
    for each in (model, reference):
        each.zero_grad()
    with excited_once(model):
        step(model)
    step(reference)
    same(gradients(model), gradients(reference))


def check_loss(model, reference):
    batch = images()
    check_step(model, lambda model: loss(model, batch).backward(), reference)


def scalar(model, batch):
    """The loss as a function of the parameters, and these."""
    names, values = zip(*model.named_parameters(), strict=True)

    def function(*parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (batch,)).sin().square().sum()

    return function, values


def vectorized(function, values):
    return torch.autograd.functional.hessian(function, values, vectorize=True)


def third(function, values):
    slopes = torch.autograd.grad(function(*values), values, create_graph=True)
    for _ in range(2):
        slopes = torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), values, create_graph=True)
    return slopes


def inner_steps(function, values):
    """As in MAML: through two steps of gradient descent."""
    fast = values
    for _ in range(2):
        slopes = torch.autograd.grad(function(*fast), fast, create_graph=True)
        fast = [value - 0.01 * slope for value, slope in zip(fast, slopes, strict=True)]
    return torch.autograd.grad(function(*fast), values)


def transformed(function, values):
    return torch.func.grad(function, tuple(range(len(values))))(*values)


def ensemble(function, values):
    stacks = [torch.stack([value, value.sin(), value.cos()]) for value in values]
    return torch.func.vmap(lambda *one: transformed(function, one))(*stacks)


DERIVATIVES = torch.autograd.functional.hessian, vectorized, third, inner_steps, transformed, ensemble


@pytest.mark.parametrize("derive", DERIVATIVES)
def test_derivatives_of_any_order(formulation, derive):
    conv, batch = layer(formulation), images(size=4)
    conv.weight.data *= 4
    same(*(tree_leaves(derive(*scalar(model, batch))) for model in (conv, twin(conv))))


@pytest.mark.parametrize("formulation, kind", [("channel", "mwe"), ("paper", "lwe"), ("paper", "none")])
def test_second_derivatives_by_finite_differences(formulation, kind):
    """Without the map, to whose gradient the maximum is a constant."""
    assert torch.autograd.gradgradcheck(*scalar(layer(formulation, excitation=kind), images(1, 3)))


def test_a_penalty_on_the_gradient_of_the_images(formulation):
    def step(model):
        (slope,) = torch.autograd.grad(loss(model, batch), batch, create_graph=True)
        slope.square().sum().backward()

    model, batch = network(formulation), images().requires_grad_()
    check_step(model, step, twin(model))


@pytest.mark.parametrize("is_made_inside", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_a_step_inside_is_refused_before_a_weight_is_touched(is_made_inside, kind):
    model, optimizer = network().eval(), None
    before = copy.deepcopy(model.state_dict())
    optimizer = kind(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="steps inside"), excited_once(model):
        optimizer = kind(model.parameters(), 0.1) if is_made_inside else optimizer
        (value := loss(model, images())).backward()
        optimizer.step(lambda: value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.step(lambda: value)  # after the block, it may


def test_a_backward_pass_after_the_block_is_refused(formulation):
    model = network(formulation)
    with excited_once(model):
        value = loss(model, images())
    with pytest.raises(RuntimeError, match="backward pass comes after the end"):
        value.backward()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_closures_that_contain_the_block(formulation, kind):
    model, batch = network(formulation), images()
    reference = copy.deepcopy(model)
    for each, context in ((model, excited_once), (reference, contextlib.nullcontext)):
        optimizer = kind(each.parameters(), 0.01)

        def closure(each=each, context=context, optimizer=optimizer):
            optimizer.zero_grad()
            with context(each):
                (value := loss(each, batch)).backward()
            return value

        for _ in range(2):
            optimizer.step(closure)
    same(model.parameters(), reference.parameters())


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_at_the_start_of_the_block(formulation, set_to_none):
    pairs = [(model := network(formulation), excited_once), (twin(model), contextlib.nullcontext)]
    optimizers = [torch.optim.SGD(each.parameters(), 0.01, momentum=0.9) for each, _ in pairs]
    for _ in range(3):
        batches = images(), images()
        for (each, context), optimizer in zip(pairs, optimizers, strict=True):
            with context(each):
                optimizer.zero_grad(set_to_none)
                for batch in batches:
                    loss(each, batch).backward()
            optimizer.step()
        same(*(gradients(each) for each, _ in pairs))


@pytest.mark.parametrize("cleared", ["model", "optimizer", "first layers", "one after another"])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_zero_grad_between_backward_passes(formulation, cleared, is_frozen):
    """All of the gradients or, as of one of two players, some; in later steps, also those of the step before."""
    model, found = network(formulation), []
    model[0].weight.requires_grad_(not is_frozen)
    batches = [images() for _ in range(3)]
    for each, context in ((model, excited_once), (twin(model), contextlib.nullcontext)):
        first, *rest = each.parameters()
        parts = {
            "model": [each],
            "optimizer": [torch.optim.SGD(each.parameters())],
            "first layers": [each[:3]],
            "one after another": [torch.optim.SGD(rest), torch.optim.SGD([first])],
        }
        for _ in range(2):
            with context(each):
                for index, batch in enumerate(batches):
                    loss(each, batch).backward()
                    for part in parts[cleared] if index == 1 else ():
                        part.zero_grad()
        found.append(gradients(each))
    same(*found)


def test_zero_grad_with_a_weight_in_two_layers_and_blocks(formulation):
    model = nn.Sequential(*(Conv2d(3, 3, 3, formulation=formulation).double() for _ in range(2)))
    model[1].weight = model[0].weight
    found = []
    for each, context in ((model, excited_once), (twin(model), contextlib.nullcontext)):
        with context(each[0]), context(each):
            for seed in range(2):
                each.zero_grad()
                torch.manual_seed(seed)
                loss(each, images()).backward()
        found.append(gradients(each))
    same(*found)


scaler = torch.amp.GradScaler("cpu")


def test_gradients_that_are_set_inside(formulation):
    """To numbers, which are what the layers begin with again; and deleted."""
    found = []
    for model, context in ((network(formulation), excited_once), (None, contextlib.nullcontext)):
        model = model or twin(found[0][0])
        torch.manual_seed(1)
        with context(model):
            loss(model, images()).backward()
            for parameter in model[0].parameters():
                parameter.grad = torch.ones_like(parameter)
            for parameter in model[3].parameters():
                del parameter.grad
            loss(model, images()).backward()
        found.append((copy.deepcopy(model), gradients(model)))
    same(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["0.weight", "3.gate.fc1.bias"])
def test_gradients_of_a_part_of_a_layer_cant_be_cleared_alone(name):
    model = network()
    with pytest.raises(RuntimeError, match="for its weight and its gate"), excited_once(model):
        loss(model, images()).backward()
        model.get_parameter(name).grad = None
    with excited_once(model):
        model.get_parameter(name).grad = None
        loss(model, images()).backward()


def test_a_gate_whose_layers_share_a_tensor(monkeypatch):
    class Tied(ChannelGate):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
            self.fc2.weight = self.fc1.weight

        def forward(self, statistic):
            return self.broadcast(self.fc2(self.fc1(self.scaled(statistic)).abs()).sigmoid())

    monkeypatch.setitem(FORMULATIONS, "tied", {"mwe": Tied})
    model = nn.Sequential(Conv2d(3, 4, 2, formulation="tied"), nn.GroupNorm(2, 4)).double()
    check_loss(model, twin(model))


def test_layers_that_are_frozen_and_trained_inside_a_block(formulation):
    """As of two players: what is frozen gathers nothing, and what is trained from then on does."""
    model, found = network(formulation), []
    for each, context in ((model, excited_once), (twin(model), contextlib.nullcontext)):
        each[0].requires_grad_(False)
        torch.manual_seed(1)
        with context(each):
            loss(each, images()).backward()
            each[0].requires_grad_(True)
            each[3].requires_grad_(False)
            loss(each, images()).backward()
            each[3].requires_grad_(True)
        found.append(gradients(each))
    same(*found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_without_a_block(formulation, use_reentrant):
    model, batch = network(formulation), images().requires_grad_()
    reference = twin(model)
    checkpoint(model, batch, use_reentrant=use_reentrant).sin().square().sum().backward()
    loss(reference, batch).backward()
    same(gradients(model), gradients(reference))


USES = {
    "clip_grad_norm_": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1),
    "clip_grad_value_": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1),
    "unscale_": lambda model: scaler.unscale_(torch.optim.SGD(model.parameters())),
    "SAM's first step": lambda model: [parameter.add_(parameter.grad) for parameter in model.parameters()],
    "a norm": lambda model: model[0].gate.fc1.bias.grad.norm(),
    "zeros": lambda model: torch.optim.SGD(model.parameters()).zero_grad(set_to_none=False),
    "other zeros": lambda model: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("use", USES)
def test_gradients_cant_be_used_before_they_are_there(use):
    model = network("paper")
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="at the end of excited_once"), excited_once(model):
        scaler.scale(loss(model, images())).backward()
        with torch.no_grad():
            USES[use](model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name.startswith("0."))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_autograd_grad_inside_is_refused():
    model = network()
    with excited_once(model):
        output = loss(model, images())
        with pytest.raises(RuntimeError, match=r"call torch.autograd.grad\(\) for them outside"):
            torch.autograd.grad(output, list(model.parameters()), allow_unused=True)
        assert torch.autograd.grad(output, model[-1].weight)[0].any()
    assert (model[0].weight + 1).requires_grad and type(model[0].weight) is nn.Parameter


WRITES = {
    "data in place": lambda model: [parameter.data.mul_(1.5) for parameter in model.parameters()],
    "other data": lambda model: [setattr(parameter, "data", parameter + 0.5) for parameter in model.parameters()],
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()).sin(), model.parameters()
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_data_that_is_written_to_inside_a_block(formulation, write):
    model, batch = network(formulation), images()
    reference = twin(model)
    with excited_once(model):
        for each in (model, reference):
            before = loss(each, batch)
            before.backward()
            with torch.no_grad():
                WRITES[write](each)
            after = loss(each, batch)
            assert not torch.allclose(before, after)
            after.backward()
    same(gradients(model), gradients(reference))


def through_file(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("snapshot", [copy.deepcopy, through_file])
def test_a_copy_taken_inside_excites_by_itself(snapshot):
    model, batch = network().eval(), images()
    with excited_once(model):
        copied = snapshot(model).eval()
        assert {type(parameter) for parameter in copied.parameters()} == {nn.Parameter}
        assert torch.equal(copied(batch), model(batch))
    with torch.no_grad():
        for parameter in (*model.parameters(), *copied.parameters()):
            parameter.mul_(1.1).add_(0.1)
    same([copied(batch)], [twin(model)(batch)])
    check_loss(copied, twin(model))


def test_weights_given_inside(formulation):
    """By functional_call() for one pass, and by load_state_dict() to stay."""
    model, batch = network(formulation).eval(), images()
    reference = twin(model)
    state = {name: value.detach() + 0.1 for name, value in model.named_parameters()}
    with excited_once(model):
        unchanged, called = model(batch), functional_call(model, state, (batch,))
        model.load_state_dict(state, strict=False)
        loaded = model(batch)
    expected = functional_call(reference, state, (batch,))
    same([unchanged, called, loaded], [reference(batch), expected, expected])


def test_frozen_inside():
    model = network()
    with excited_once(model):
        model[0].requires_grad_(False)
        loss(model, images()).backward()
    assert [gradient is None for gradient in gradients(model)] == [True] * 6 + [False] * 12


@pytest.fixture(scope="module")
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters"])
def test_options_of_ddp_that_cant_work_are_refused(group, option):
    model = DistributedDataParallel(network(), **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True"), excited_once(model):
        pass
    assert model.module[0].excited is None


def test_fsdp_is_refused(group):
    """By the class that fully_shard() gives a module in place of its own."""
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="FSDP"), excited_once(model):
        pass


def test_ddp_gives_the_same_gradients(group, formulation):
    model = network(formulation)
    reference, batches, wrapped = twin(model), images(4).split(2), DistributedDataParallel(model)
    with excited_once(wrapped):
        with wrapped.no_sync():
            loss(wrapped, batches[0]).backward()
        loss(wrapped, batches[1]).backward()
    for batch in batches:
        loss(reference, batch).backward()
    same(gradients(model), gradients(reference))


@pytest.mark.parametrize("around", ["forward", "backward", "block"])
def test_autocast_around_more_than_the_forward_pass(formulation, around):
    def autocast(is_on=True):
        return torch.autocast("cpu", torch.bfloat16, enabled=is_on)

    model, batch, found = network(formulation).float(), images().float(), []
    for place, context in (("forward", contextlib.nullcontext), (around, excited_once)):
        model.zero_grad()
        with autocast(place == "block"), context(model):
            with autocast():
                value = loss(model, batch)
            with autocast(place != "forward"):
                value.backward()
        found.append(gradients(model))
    same(*found, 1e-6)


def test_excite_and_fold_keep_all_that_a_layer_has():
    conv, calls = nn.Conv2d(3, 8, 3), []
    conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    conv.register_forward_hook(lambda _, __, output: calls.append("forward") or 2 * output)
    conv.register_full_backward_hook(lambda *_: calls.append("backward"))
    conv.scale = nn.Parameter(torch.ones(1))
    conv.register_buffer("count", torch.zeros(1))
    model = nn.Sequential(conv, nn.BatchNorm2d(8)).double()
    parameters, names = dict(model.named_parameters()), list(model.state_dict())
    assert excite(model)[0] is conv
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert [name for name in model.state_dict() if "gate" not in name] == list(fold(model).state_dict()) == names
    for each in (model, fold(model)):
        calls.clear()
        loss(each, images()).backward()
        assert calls == ["pre", "forward", "backward"]
        assert torch.equal(each[0](images() * 0)[0, :, 0, 0], 2 * each[0].bias)


REPARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("kind", [*REPARAMETRIZATIONS, "complex"])
def test_excite_refuses_before_anything_changes(kind):
    model = nn.ModuleDict({"plain": nn.Conv2d(3, 4, 1), "odd": nn.Conv2d(4, 8, 3)})
    model["odd"].to(torch.complex64) if kind == "complex" else REPARAMETRIZATIONS[kind](model["odd"])
    before = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())
    with pytest.raises(ValueError, match="odd"):
        excite(model, select=lambda *_: True)
    assert before == ([(name, type(module)) for name, module in model.named_modules()], list(model.state_dict()))


@pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
def test_a_layer_reparametrized_after_it_was_excited(formulation, kind):
    model = network(formulation)
    REPARAMETRIZATIONS[kind](model[0])
    model.eval()
    batch, found = images(), []
    for context in (excited_once, contextlib.nullcontext):
        model.zero_grad()
        with context(model):
            loss(model, batch).backward()
        found.append(gradients(model))
    same(*found)
    with pytest.raises(ValueError, match="0 is reparametrized"):
        fold(model)


@pytest.mark.parametrize("other", [{"formulation": "paper"}, {"excitation": "lwe"}, {"standardize": False}])
def test_exciting_twice(other):
    model = network()
    parameters = list(model.parameters())
    again = excite(model, example=images(1))
    assert all(one is two for one, two in zip(again.parameters(), parameters, strict=True))
    with pytest.raises(ValueError, match="0 is excited already"):
        excite(model, **other, example=images(1))


def test_a_frozen_layer_gets_a_frozen_gate():
    model = nn.Sequential(nn.Conv2d(3, 8, 3).requires_grad_(False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).eval()
    excite(model, select=lambda *_: True)
    assert [parameter.requires_grad for parameter in model[0].parameters()] == [False] * 6
    assert [parameter.requires_grad for parameter in model[2].parameters()] == [True] * 6
    assert not any(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in fold(model).parameters()] == [False] * 2 + [True] * 4


def test_what_cant_be_folded_or_excited():
    kind = type("Scaled", (Conv2d,), {"forward": lambda self, input: 3 * Conv2d.forward(self, input)})
    with pytest.raises(ValueError, match="0 is a Scaled"):
        fold(nn.Sequential(kind(3, 8, 3)))
    with pytest.raises(ValueError, match="complex"):
        Conv2d(2, 3, 2, dtype=torch.complex64)


VIEWS = {
    "strided": lambda weight: weight[:, 2::2],
    "expanded": lambda weight: weight[:, :1].expand(8, 3, 3, 3),
    "transposed": lambda weight: weight[:3].transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_weights_with_unusual_strides(formulation, view):
    conv = nn.Conv2d(3, 8, 3).double()
    conv.weight = nn.Parameter(VIEWS[view](torch.randn(8, 8, 3, 3, dtype=torch.float64)))
    excite(conv, formulation=formulation)
    for reference in (twin(conv), copy.deepcopy(conv), twin(conv)):
        check_loss(conv, reference)


def test_excited_weights_that_share_a_gradient(formulation):
    """The sum's, of which each leaf, and a parameter, gets a view; it is overwritten in the excitation's way back."""
    model = nn.ModuleList(Conv2d(4, 4, 3, formulation=formulation).double() for _ in range(3))
    model.append(nn.Linear(1, 4 * 4 * 9, bias=False).double())

    def step(model, count):
        *convs, linear = model
        (
            sum(conv.excited_weight().flatten() for conv in convs[:count]) + linear.weight.flatten()
        ).sin().sum().backward()

    for count in (3, 1):
        check_step(model, functools.partial(step, count=count), twin(model))


def test_tracing_and_export(formulation):
    model, batch = network(formulation).eval(), images()
    exported = [torch.export.export(model, (batch,), strict=strict).module() for strict in (False, True)]
    same([each(batch) for each in (torch.fx.symbolic_trace(model), *exported)], [twin(model)(batch)] * 3)


@pytest.mark.parametrize("make", [lambda *words: torch.export.export(*words).module(), torch.jit.trace])
def test_what_is_exported_inside_a_block_has_its_weights(formulation, make):
    """And not the excited ones of that step."""
    model, batch = network(formulation).eval(), images()
    with excited_once(model):
        made = make(model, (batch,))
    with torch.no_grad():
        made.get_parameter("0.weight").add_(1)
        model[0].weight.add_(1)
    same([made(batch)], [model(batch)])


@BLOCK_OR_NOT
@pytest.mark.parametrize("is_fake", [False, True])
def test_without_data(formulation, context, is_fake):
    with torch._subclasses.fake_tensor.FakeTensorMode() if is_fake else torch.device("meta"):
        model = layer(formulation)
        with context(model):
            output = model(images())
            output.sum().backward()
    assert output.shape == (2, 4, 6, 6)
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


class Half(nn.Linear):
    def forward(self, input):
        return super().forward(input) / 2


@BLOCK_OR_NOT
@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_changed_gate_is_called_as_a_module(formulation, context, is_hooked):
    model, batch = layer(formulation), images()
    reference = twin(model)
    if is_hooked:
        model.gate.fc1.register_forward_hook(lambda _, __, output: output / 2)
    else:
        model.gate.fc1.__class__ = Half
    with context(model):
        loss(model, batch).backward()
    for parameter in reference.gate.fc1.parameters():
        parameter.data /= 2
    loss(reference, batch).backward()
    for parameter in reference.gate.fc1.parameters():
        parameter.grad /= 2
    same(gradients(model), gradients(reference))


@BLOCK_OR_NOT
@pytest.mark.parametrize("place", ["gate", "gate.fc1", "gate.fc2"])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_of_a_gate_are_called(formulation, context, place, kind):
    model, calls = layer(formulation), []
    getattr(model.get_submodule(place), f"register_{kind}_hook")(lambda *_: calls.append(place))
    with context(model):
        loss(model, images()).backward()
    assert calls == [place]


def test_a_step_inside_is_refused_whichever_group_has_the_weights():
    model = network()
    convs = [conv for conv in model.modules() if isinstance(conv, Conv2d)]
    weights = [parameter for conv in convs for parameter in conv.parameters()]
    others = [parameter for parameter in model.parameters() if all(parameter is not weight for weight in weights)]
    optimizer = torch.optim.SGD([{"params": others}, {"params": weights}], 0.1)
    with pytest.raises(RuntimeError, match="steps inside"), excited_once(model):
        loss(model, images()).backward()
        optimizer.step()


def test_biases_may_be_stepped_inside():
    """Nothing of the excitation depends on them."""
    model = network()
    biases = [conv.bias for conv in model.modules() if isinstance(conv, Conv2d)]
    before = [bias.clone() for bias in biases]
    optimizer = torch.optim.SGD(biases, 0.1)
    with excited_once(model):
        loss(model, images()).backward()
        optimizer.step()
    assert not any(map(torch.equal, before, biases))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_are_excited_outside_of_their_devices_autocast(device):
    """Also on a GPU, which a fake tensor stands for."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        weight = torch.empty(2, 3, device=device)
    torch.set_autocast_enabled(device, True)
    try:
        with full_precision(weight):
            assert not torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, False)


def test_threads_that_train_at_once(formulation):
    """Each its own layer of one shape, whose memory is kept from step to step."""
    torch.manual_seed(0)
    convs = [Conv2d(48, 48, 3, formulation=formulation).double() for _ in range(2)]
    upstream = torch.randn(20, *convs[0].weight.shape, dtype=torch.float64)

    def train(conv):
        for grad in upstream:
            with excited_once(conv):
                conv.excited_weight().backward(grad)

    alone = [twin(conv) for conv in convs]
    for conv in alone:
        train(conv)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, convs))
    for conv, reference in zip(convs, alone, strict=True):
        same(gradients(conv), gradients(reference))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(formulation, use_reentrant):
    def step(model):
        for batch in batches:
            hidden = checkpoint(model[:3], batch, use_reentrant=use_reentrant)
            checkpoint(model[3:], hidden, use_reentrant=use_reentrant).sin().sum().backward()

    batches = [images().requires_grad_() for _ in range(2)]
    check_step(model := network(formulation), step, twin(model))


def test_blocks_in_each_other_and_a_layer_in_two_models():
    first, batch = network(), images()
    both = nn.ModuleList([first, nn.Sequential(first[0], nn.Conv2d(8, 2, 1).double())])
    reference = twin(both)
    with excited_once(first), excited_once(both[1]), excited_once(both):
        for model in both:
            with excited_once(model):
                loss(model, batch).backward()
    for model in reference:
        loss(model, batch).backward()
    same(gradients(both), gradients(reference))


def test_a_layer_that_is_not_used_has_no_gradient():
    model, batch = nn.ModuleList([network(), Conv2d(3, 8, 3)]), images()
    check_step(model, lambda model: loss(model[0], batch).backward(), twin(model))
    assert model[1].weight.grad is None


@pytest.mark.slow
def test_a_compiled_network(formulation):
    model = network(formulation)
    reference = twin(model)
    model.compile()
    for _ in range(2):
        check_loss(model, reference)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_a_network_is_compiled_once_for_all_steps(options):
    """Whatever optimizer writes to the weights: each raises their versions, and fused ones of some versions don't."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network("paper")
    reference = twin(model)
    model.compile(backend="eager")
    optimizers = [torch.optim.AdamW(each.parameters(), **options) for each in (model, reference)]
    graphs = []
    for _ in range(6):
        check_loss(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == 6 * graphs[:1]


def test_after_an_exception_the_next_block_is_right():
    model = network()
    with pytest.raises(KeyboardInterrupt), excited_once(model):
        loss(model, images()).backward()
        raise KeyboardInterrupt
    assert model[0].weight.grad is None
    check_loss(model, twin(model))


def test_a_block_after_inference_mode():
    model, batch = network().eval(), images()
    with torch.inference_mode(), excited_once(model):
        same([model(batch)], [twin(model)(batch)])
    check_loss(model, twin(model))


def test_a_weight_in_two_layers_is_excited_for_each(formulation):
    model = nn.Sequential(*(Conv2d(3, 3, 3, formulation=formulation).double() for _ in range(2)))
    model[1].weight = model[0].weight
    check_loss(model, twin(model))


def build(name, **arguments):
    """A network of torchvision, or else of timm."""
    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name, **arguments)
    return pytest.importorskip("timm").create_model(name, **arguments)


def test_select_and_a_single_layer():
    model = excite(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), select=lambda n, _: n > "1"
    )
    assert [isinstance(module, Conv2d) for module in model] == [False, False, True]
    assert isinstance(excite(nn.Conv2d(3, 8, 3)), Conv2d)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet10t"])
def test_a_step_of_whole_networks(name):
    model, batch = excite(build(name, num_classes=10)).double(), images(4, 64)

    def step(model):
        torch.manual_seed(0)  # for dropout
        loss(model, batch).backward()

    check_step(model, step, copy.deepcopy(model))


def test_onnx_takes_a_folded_network(tmp_path):
    model, batch = network("paper").float().eval(), images().float()
    torch.onnx.export(fold(model), (batch,), tmp_path / "folded.onnx", input_names=["images"], dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "folded.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), model(batch), rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's path")
def test_a_block_takes_the_memory_of_the_one_before():
    """Page faults of fresh memory take as long as the arithmetic; here the first weight is still held."""
    conv = Conv2d(4, 6, 3)
    held = []
    for _ in range(2):
        with excited_once(conv):
            held.append(conv.excited)
    assert held[0].data_ptr() == held[1].data_ptr()


def test_gradients_that_are_enabled_inside_a_block(formulation):
    model = network(formulation)
    reference, batch = twin(model), images()
    with torch.no_grad(), excited_once(model), torch.enable_grad():
        loss(model, batch).backward()
    loss(reference, batch).backward()
    same(*([parameter.grad for parameter in each.parameters()] for each in (model, reference)))


@pytest.mark.parametrize("write", ["in place", "another"])
def test_a_gate_that_is_written_to_inside_a_block(formulation, write):
    model, batch = network(formulation), images()
    reference = twin(model)
    with torch.no_grad(), excited_once(model):
        model(batch)
        for each in (model, reference):
            bias = each[0].gate.fc2.bias
            if write == "in place":
                bias.add_(3)
            else:
                each[0].gate.fc2.bias = nn.Parameter(bias + 3)
        same([model(batch)], [reference(batch)])


def test_derivatives_in_forward_mode(formulation):
    """By torch.autograd.forward_ad, against two backward passes."""
    conv = layer(formulation)
    raw, along = conv.weight.detach(), torch.randn_like(conv.weight)

    def excited(weight):
        return torch.func.functional_call(Weight(conv), {"conv.weight": weight}, ())

    _, expected = torch.autograd.functional.jvp(excited, raw, along)
    with forward_ad.dual_level():
        same([forward_ad.unpack_dual(excited(forward_ad.make_dual(raw, along))).tangent], [expected])


class Weight(nn.Module):
    """Gives a convolution's excited weight."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self):
        return self.conv.excited_weight()
