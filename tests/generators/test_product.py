"""Pieces add up to the one product; gradients, batches and tangents are those of the formula."""

import itertools
import math
import operator

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from npas_fx import plan_of, transform
from npas_fx.examples.residual_cnn import ResidualCNN
from npas_fx.generators import product
from npas_fx.generators.product import mix

# Alike and not, shorter and longer than templates, of whole tiles and not.
SHAPES = [
    ((6,),),
    ((3,), (2, 2), (4,)),
    ((2, 5), (10,), (5, 2), (10,)),
    ((6, 4), (3, 4), (2, 2, 3), (24,)),
    ((7,), (7,), (7,), (7,), (7,), (12,), (12,), (3,)),
]
SIZES = [(1, 1), (1, 6), (2, 3), (3, 5), (3, 12), (4, 7)]


@pytest.fixture(params=["long pieces", "short pieces"])
def _pieces(request, monkeypatch):
    """Both as they are, and so short that even small weights take several."""
    if request.param == "short pieces":
        monkeypatch.setattr(product, "KEPT_BYTES", 16 * 2 * 4)  # two small float32 weights
        monkeypatch.setattr(product, "CACHED", 6)
        monkeypatch.setattr(product, "MIN_COLUMNS", 2)


def operands(size, shapes, *, dtype=torch.float64):
    count, length = size
    torch.manual_seed(0)
    rows = sum(math.ceil(math.prod(shape) / length) for shape in shapes)
    return torch.randn(count, length, dtype=dtype), torch.randn(rows, count, dtype=dtype)


def by_formula(templates, coefficients, shapes):
    """Each tile by itself, of ordinary operations that torch differentiates and batches."""
    rows = iter(coefficients.unbind())
    weights = []
    for shape in shapes:
        numel, tile = math.prod(shape), templates.shape[1]
        tiles = [sum(map(operator.mul, next(rows), templates)) for _ in range(0, numel, tile)]
        weights.append(torch.cat(tiles)[:numel].reshape(shape))
    return weights


def flat(weights):
    return torch.cat([weight.reshape(-1) for weight in weights])


cases = pytest.mark.parametrize(("size", "shapes"), list(itertools.product(SIZES, SHAPES)), ids=str)


@pytest.mark.usefixtures("_pieces")
@cases
def test_pieces_are_those_of_the_formula(size, shapes):
    both = operands(size, shapes)
    weights = mix(*both, shapes)
    assert [tuple(weight.shape) for weight in weights] == list(shapes)
    assert all(weight.is_contiguous() for weight in weights)
    torch.testing.assert_close(flat(weights), flat(by_formula(*both, shapes)))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@cases
def test_weights_start_at_a_cache_line(size, shapes, dtype):
    for weight in mix(*operands(size, shapes, dtype=dtype), shapes):
        assert weight.data_ptr() % 64 == 0


@pytest.mark.usefixtures("_pieces")
@cases
def test_gradients_are_those_of_the_formula(size, shapes):
    ours, theirs = ([t.requires_grad_() for t in operands(size, shapes)] for _ in range(2))
    toward = torch.randn(sum(map(math.prod, shapes)), dtype=torch.float64)
    (flat(mix(*ours, shapes)) @ toward).backward()
    (flat(by_formula(*theirs, shapes)) @ toward).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("shapes", SHAPES[2:], ids=str)
@pytest.mark.parametrize("size", SIZES[1:4], ids=str)
def test_gradients_of_gradients(size, shapes):
    inputs = [t.requires_grad_() for t in operands(size, shapes)]

    def joined(*inputs):
        return flat(mix(*inputs, shapes))

    assert torch.autograd.gradcheck(joined, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(joined, inputs)


@pytest.mark.usefixtures("_pieces")
def test_a_weight_that_is_not_used_takes_no_part_in_the_gradient():
    shapes = ((6,), (2, 2), (3,))
    inputs = [t.requires_grad_() for t in operands((2, 3), shapes)]
    for used in ((0,), (1,), (2,), (0, 2), (1, 2)):

        def some(*inputs, used=used):
            weights = mix(*inputs, shapes)
            return flat(weights[k] for k in used)

        assert torch.autograd.gradcheck(some, inputs)


def test_a_weight_without_gradient_gives_none_to_its_rows():
    templates = torch.randn(2, 4, requires_grad=True)
    coefficients = torch.randn(3, 2, requires_grad=True)
    first, _, third = mix(templates, coefficients, ((4,), (4,), (2,)))
    (first.sum() + third.sum()).backward()
    assert torch.equal(coefficients.grad[1], torch.zeros(2))
    assert coefficients.grad[[0, 2]].abs().min() > 0
    expected = coefficients[0].outer(torch.ones(4))
    expected[:, :2] += coefficients[2].outer(torch.ones(2))
    torch.testing.assert_close(templates.grad, expected)


def test_half_precision_adds_up_many_pieces(monkeypatch):
    monkeypatch.setattr(product, "MIN_COLUMNS", 8)
    monkeypatch.setattr(product, "CACHED", 8)
    templates = torch.ones(3, 4096, dtype=torch.bfloat16)
    coefficients = torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)
    flat(mix(templates, coefficients, ((4096,),) * 4)).sum().backward()
    assert torch.equal(coefficients.grad, torch.full((4, 3), 4096, dtype=torch.bfloat16))


@pytest.mark.usefixtures("_pieces")
@cases
def test_all_memory_is_written(size, shapes):
    """Uninitialised memory is made of NaN here."""
    inputs = [t.requires_grad_() for t in operands(size, shapes)]
    torch.use_deterministic_algorithms(True)
    try:
        weights = mix(*inputs, shapes)
        for used in (weights, weights[:1], weights[-1:]):
            gradients = torch.autograd.grad(flat(used).sum(), inputs, retain_graph=True)
            assert all(gradient.isfinite().all() for gradient in (*used, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_of_large_weights_is_freed_one_by_one(monkeypatch):
    monkeypatch.setattr(product, "KEPT_BYTES", 3 * 64)
    weights = mix(*operands((2, 8), ((8,),) * 7), ((8,),) * 7)
    storages = [weight.untyped_storage() for weight in weights]
    assert {storage.nbytes() for storage in storages} == {64, 3 * 64}
    assert len({storage.data_ptr() for storage in storages}) == 3


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
@cases
def test_vmap_is_a_loop(size, shapes, batched):
    both = operands(size, shapes)
    stacked = [
        t if dim is None else torch.stack([t, 2 * t, t + 1], dim)
        for t, dim in zip(both, batched, strict=True)
    ]
    together = vmap(lambda t, c: mix(t, c, shapes), batched)(*stacked)
    for k in range(3):
        one = [
            t if dim is None else t.select(dim, k) for t, dim in zip(stacked, batched, strict=True)
        ]
        torch.testing.assert_close(
            flat(weight[k] for weight in together), flat(by_formula(*one, shapes))
        )


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_jacobians_are_those_of_the_formula(shapes, transform):
    both = operands((2, 5), shapes)

    def squares(rule):
        def total(templates, coefficients):
            return flat(rule(templates, coefficients, shapes)).pow(2).sum()[None]

        return transform(total, (0, 1))(*both)

    torch.testing.assert_close(squares(mix), squares(by_formula))


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("order", [grad, lambda f: jacrev(grad(f))], ids=["first", "second"])
def test_gradients_of_only_some_weights_may_be_batched(order):
    shapes = ((6,), (6,), (4,), (4,))
    templates, coefficients = operands((2, 5), shapes)
    inputs = torch.randn(3, 6, dtype=torch.float64)

    def loss(rule):
        def loss(templates, x):
            first, second, third, _ = rule(templates, coefficients, shapes)
            return first.pow(2) @ x + second.sum() + third.pow(3).sum()

        return loss

    ours = vmap(order(loss(mix)), (None, 0))(templates, inputs)
    theirs = torch.stack([order(loss(by_formula))(templates, x) for x in inputs])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_pieces")
@cases
def test_operands_may_be_batched_where_gradients_are_not(size, shapes):
    both = operands(size, shapes)
    toward = torch.randn(sum(map(math.prod, shapes)), dtype=torch.float64)

    def gradients(rule, templates, coefficients):
        _, back = vjp(lambda *both: flat(rule(*both, shapes)), templates, coefficients)
        return back(toward)

    stacked = [torch.stack([t, 2 * t]) for t in both]
    with torch.no_grad():  # then nobody asks for gradients of gradients
        ours = vmap(gradients, (None, 0, 0))(mix, *stacked)
    for k in range(2):
        theirs = gradients(by_formula, *(t[k] for t in stacked))
        torch.testing.assert_close(tuple(t[k] for t in ours), theirs)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("create_graph", [False, True])
@cases
def test_gradients_are_not_cast_under_autocast(size, shapes, create_graph):
    inputs = [t.requires_grad_() for t in operands(size, shapes, dtype=torch.float32)]
    total = flat(mix(*inputs, shapes)).sum()
    plain = torch.autograd.grad(total, inputs, create_graph=create_graph, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.autograd.grad(total, inputs, create_graph=create_graph)
    for mine, other in zip(under, plain, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_autograd_may_batch_gradients(shapes):
    inputs = [t.requires_grad_() for t in operands((2, 5), shapes)]
    weights = flat(mix(*inputs, shapes))
    every = torch.eye(len(weights), dtype=torch.float64)
    batched = torch.autograd.grad(weights, inputs, every, is_grads_batched=True, retain_graph=True)
    for k, row in enumerate(every):
        for all_of_it, one in zip(
            batched, torch.autograd.grad(weights, inputs, row, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(all_of_it[k], one)


def make_chain():
    widths = (8, 16, 16, 16, 16, 4)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers), torch.randn(5, 8)


def make_residual():
    return ResidualCNN(width=16, num_blocks=2), torch.randn(5, 1, 8, 8)


@pytest.fixture(scope="module", params=[make_chain, make_residual], ids=["chain", "residual"])
def emitted(request):
    """A module with banks in double precision, its parameters and a batch."""
    torch.manual_seed(0)
    model, inputs = request.param()
    shared = transform(model, 0.3).double().eval()
    assert any(not bank.is_dedicated for bank in plan_of(shared).banks)
    return shared, dict(shared.named_parameters()), inputs.double()


def call(module, parameters, x):
    return functional_call(module, parameters, (x[None],))[0]


def loss(module, parameters, x):
    return call(module, parameters, x).pow(2).sum()


def detached(parameters):
    return {name: parameter.detach() for name, parameter in parameters.items()}


def by_autograd(module, parameters, x):
    of_each = torch.autograd.grad(loss(module, parameters, x), list(parameters.values()))
    return dict(zip(parameters, of_each, strict=True))


def test_grad_of_a_module_is_that_of_autograd(emitted):
    module, parameters, inputs = emitted
    expected = by_autograd(module, parameters, inputs[0])
    ours = grad(loss, 1)(module, detached(parameters), inputs[0])
    torch.testing.assert_close(ours, expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


def test_vmap_over_inputs_is_the_batch(emitted):
    module, parameters, inputs = emitted
    ours = vmap(call, (None, None, 0))(module, detached(parameters), inputs)
    torch.testing.assert_close(ours, module(inputs).detach())


def test_gradients_of_each_sample_are_a_loop(emitted):
    module, parameters, inputs = emitted
    ours = vmap(grad(loss, 1), (None, None, 0))(module, detached(parameters), inputs)
    for k, x in enumerate(inputs):
        expected = by_autograd(module, parameters, x)
        torch.testing.assert_close({name: each[k] for name, each in ours.items()}, expected)


def test_vmap_over_parameters_is_an_ensemble(emitted):
    module, parameters, inputs = emitted
    torch.manual_seed(1)
    members = [
        {name: p + 0.1 * torch.randn_like(p) for name, p in detached(parameters).items()}
        for _ in range(3)
    ]
    stacked = {name: torch.stack([member[name] for member in members]) for name in parameters}
    outputs = vmap(lambda given: functional_call(module, given, (inputs,)))(stacked)
    expected = torch.stack([functional_call(module, member, (inputs,)) for member in members])
    torch.testing.assert_close(outputs, expected.detach())
    gradients = vmap(grad(loss, 1), (None, 0, None))(module, stacked, inputs[0])
    for k, member in enumerate(members):
        one = grad(loss, 1)(module, member, inputs[0])
        torch.testing.assert_close({name: each[k] for name, each in gradients.items()}, one)


def test_jacobian_of_a_module_is_a_loop(emitted):
    module, parameters, inputs = emitted
    ours = jacrev(call, 1)(module, detached(parameters), inputs[0])
    for k, output in enumerate(call(module, parameters, inputs[0])):
        of_each = torch.autograd.grad(output, list(parameters.values()), retain_graph=True)
        for name, expected in zip(parameters, of_each, strict=True):
            torch.testing.assert_close(ours[name][k], expected)


def test_tangents_of_a_module_are_those_of_the_jacobian(emitted):
    module, parameters, inputs = emitted
    given = detached(parameters)
    toward = {name: torch.randn_like(parameter) for name, parameter in given.items()}
    outputs, ours = jvp(lambda p: call(module, p, inputs[0]), (given,), (toward,))
    torch.testing.assert_close(outputs, module(inputs[:1])[0].detach())
    rows = jacrev(call, 1)(module, given, inputs[0])
    expected = sum(rows[name].flatten(1) @ toward[name].flatten() for name in given)
    torch.testing.assert_close(ours, expected)
    # forward over reverse, as for the product of a Hessian and a vector
    _, curved = jvp(lambda p: grad(loss, 1)(module, p, inputs[0]), (given,), (toward,))
    step = 1e-6
    moved = {name: given[name] + step * toward[name] for name in given}
    back = {name: given[name] - step * toward[name] for name in given}
    ahead, behind = (grad(loss, 1)(module, p, inputs[0]) for p in (moved, back))
    for name, change in curved.items():
        expected = (ahead[name] - behind[name]) / (2 * step)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
