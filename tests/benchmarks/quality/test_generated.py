from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from quality.generated import Generated, LowRank, Overparameterized, Rescaled
from quality.tasks import iterate_batches
from small_tasks import TASKS, make_model

torch.set_num_threads(1)

WEIGHTS = {
    "characters": ("tokens.weight", "blocks.0.query.weight", "blocks.2.down.weight"),
    "pictures": ("stem.weight", "stages.1.0.conv1.weight", "head.weight"),
}
SHAPES = ((12, 7), (7, 12), (6, 4, 3, 3), (4, 4, 1, 1))


class Held(nn.Module):
    """Makes the weights that it holds, times one."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(weights)
        self.held = nn.ParameterList(weight.detach().clone() for weight in weights.values())

    def forward(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.held, strict=True))


def make_generated(task: str) -> tuple[nn.Module, Generated]:
    model = make_model(TASKS[task])
    names = WEIGHTS[task]
    return model, Generated(model, Held({name: model.get_parameter(name) for name in names}), names)


def draw_inputs(task: str) -> Tensor:
    inputs, _ = next(iterate_batches(TASKS[task], 1, 0))
    return inputs


def draw_weights(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"weight {index}": torch.randn(shape, generator=random) * (index + 1) + 0.1
        for index, shape in enumerate(SHAPES)
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", WEIGHTS)
@pytest.mark.parametrize("is_training", [True, False])
def test_the_network_computes_the_same_with_weights_that_are_made(
    task: str, is_training: bool
) -> None:
    model, generated = make_generated(task)
    model.train(is_training)
    generated.train(is_training)
    inputs = draw_inputs(task)
    assert torch.equal(generated(inputs), model(inputs))


@pytest.mark.parametrize("task", WEIGHTS)
def test_what_is_made_is_what_the_network_computes_with(task: str) -> None:
    model, generated = make_generated(task)
    with torch.no_grad():
        for weight, name in zip(generated.weights.held, WEIGHTS[task], strict=True):
            weight *= 1.5
            model.get_parameter(name).mul_(1.5)
    inputs = draw_inputs(task)
    assert torch.equal(generated.eval()(inputs), model.eval()(inputs))


@pytest.mark.parametrize("task", WEIGHTS)
def test_weights_that_are_made_are_no_parameters_of_the_network(task: str) -> None:
    model, generated = make_generated(task)
    others = {name for name, _ in model.named_parameters()} - set(WEIGHTS[task])
    assert {name for name, _ in generated.model.named_parameters()} == others
    assert set(generated.model.state_dict()) == set(model.state_dict()) - set(WEIGHTS[task])
    counted = sum(parameter.numel() for parameter in generated.parameters())
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("task", WEIGHTS)
def test_gradients_reach_what_makes_the_weights_and_all_others(task: str) -> None:
    model, generated = make_generated(task)
    inputs = draw_inputs(task)
    generated(inputs).square().sum().backward()
    model(inputs).square().sum().backward()
    for weight, name in zip(generated.weights.held, WEIGHTS[task], strict=True):
        torch.testing.assert_close(weight.grad, model.get_parameter(name).grad)
    for name, parameter in generated.model.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


def test_running_statistics_of_batch_norm_are_kept() -> None:
    model, generated = make_generated("pictures")
    born = copy.deepcopy(model.state_dict())
    inputs = draw_inputs("pictures")
    for _ in range(2):
        generated.train()(inputs)
    assert all(torch.equal(value, born[name]) for name, value in model.state_dict().items())
    for _ in range(2):
        model.train()(inputs)
    for name, buffer in generated.model.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name))
        assert not torch.equal(buffer, born[name])


def test_the_given_model_is_left_as_it_is() -> None:
    model = make_model(TASKS["pictures"])
    before = copy.deepcopy(model.state_dict())
    names = WEIGHTS["pictures"]
    generated = Generated(model, Held({n: model.get_parameter(n) for n in names}), names)
    generated(draw_inputs("pictures")).sum().backward()
    with torch.no_grad():
        for parameter in generated.parameters():
            parameter.zero_()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_products_of_factors_have_their_ranks_and_the_shapes_of_the_weights() -> None:
    weights = draw_weights()
    ranks = dict(zip(weights, (1, 3, 2, 4), strict=True))
    made = LowRank(weights, ranks)()
    assert {name: weight.shape for name, weight in made.items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    for name, weight in made.items():
        assert torch.linalg.matrix_rank(weight.flatten(1)) == ranks[name]


def test_factors_have_as_many_parameters_as_their_ranks_say() -> None:
    weights = draw_weights()
    low_rank = LowRank(weights, dict.fromkeys(weights, 2))
    expected = sum(2 * (len(each) + math.prod(each.shape[1:])) for each in weights.values())
    assert sum(parameter.numel() for parameter in low_rank.parameters()) == expected


def test_full_ranks_start_with_the_weights_themselves() -> None:
    weights = draw_weights()
    ranks = {name: min(weight.flatten(1).shape) for name, weight in weights.items()}
    torch.testing.assert_close(LowRank(weights, ranks)(), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_ranks_start_along_the_best_approximation_with_the_weights_deviation(
    rank: int,
) -> None:
    weights = draw_weights()
    for name, made in LowRank(weights, dict.fromkeys(weights, rank))().items():
        matrix = weights[name].flatten(1)
        # Of the best approximation, by its other description: projected on the leading
        # eigenvectors of W W^T.
        _, vectors = torch.linalg.eigh(matrix @ matrix.T)
        leading = vectors[:, -rank:]
        best = leading @ leading.T @ matrix
        torch.testing.assert_close(
            made.flatten(1) / made.norm(), best / best.norm(), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(made.std(), weights[name].std())


def test_both_factors_start_equally_large() -> None:
    weights = draw_weights()
    low_rank = LowRank(weights, dict.fromkeys(weights, 2))
    for left, right in zip(low_rank.left, low_rank.right, strict=True):
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_a_weight_of_zeros_stays_finite() -> None:
    made = LowRank({"zeros": torch.zeros(4, 5)}, {"zeros": 2})()["zeros"]
    assert torch.equal(made, torch.zeros(4, 5))


def test_only_weights_with_a_rank_are_factorized() -> None:
    weights = draw_weights()
    assert list(LowRank(weights, {"weight 2": 1})()) == ["weight 2"]


def test_sums_of_templates_start_with_the_deviation_of_the_weights() -> None:
    random = generator()
    weights = {name: torch.randn(60, 50, generator=random) * 3 for name in "abc"}
    counts = {"a": 2, "b": 3, "c": 8}
    made = Overparameterized(weights, counts, generator(1))()
    for name, weight in made.items():
        assert weight.shape == weights[name].shape
        assert weight.std().item() == pytest.approx(weights[name].std().item(), rel=0.1)


def test_each_weight_is_the_sum_of_its_own_templates() -> None:
    weights = draw_weights()
    counts = dict(zip(weights, (2, 3, 4, 5), strict=True))
    module = Overparameterized(weights, counts, generator())
    made = module()
    assert list(made) == list(counts)
    for index, (name, count) in enumerate(counts.items()):
        row, templates = module.coefficients[index], module.templates[index]
        assert templates.shape == (count, *weights[name].shape)
        assert row.norm().item() == pytest.approx(1)
        expected = sum((row[k] * templates[k] for k in range(count)), torch.zeros(()))
        torch.testing.assert_close(made[name], expected)


def test_gradients_reach_all_templates_and_coefficients_and_no_others() -> None:
    weights = draw_weights()
    module = Overparameterized(weights, dict.fromkeys(weights, 2), generator())
    module()["weight 1"].square().sum().backward()
    for index, name in enumerate(weights):
        gradients = [module.templates[index].grad, module.coefficients[index].grad]
        for gradient in gradients:
            if name == "weight 1":
                assert gradient is not None
                assert (gradient != 0).all()
            else:
                assert gradient is None


def test_the_seed_draws_the_templates() -> None:
    weights = draw_weights()
    first, again, other = (
        Overparameterized(weights, dict.fromkeys(weights, 2), generator(seed))()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in weights)
    assert not any(torch.equal(first[name], other[name]) for name in weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_on_a_gpu_get_the_same_templates() -> None:
    weights = draw_weights()
    on_gpu = {name: weight.cuda() for name, weight in weights.items()}
    counts = dict.fromkeys(weights, 2)
    made = Overparameterized(on_gpu, counts, generator())()
    torch.testing.assert_close(made, Overparameterized(weights, counts, generator())())


def test_rescaled_weights_start_with_the_deviation_of_their_targets() -> None:
    made, targets = draw_weights(0), draw_weights(1)
    rescaled = Rescaled(Held(made), {name: 7 * target for name, target in targets.items()})
    for name, weight in rescaled().items():
        torch.testing.assert_close(weight.std(), 7 * targets[name].std())
        torch.testing.assert_close(weight / weight.norm(), made[name] / made[name].norm())


def test_the_scale_stays_what_it_was_at_the_start() -> None:
    held = Held(draw_weights(0))
    rescaled = Rescaled(held, draw_weights(1))
    before = {name: weight.detach().clone() for name, weight in rescaled().items()}
    with torch.no_grad():
        for weight in held.held:
            weight *= 3
    for name, weight in rescaled().items():
        torch.testing.assert_close(weight, 3 * before[name])
    assert len(list(rescaled.parameters())) == len(SHAPES)
    rescaled()["weight 0"].sum().backward()
    assert torch.equal(held.held[0].grad, torch.full_like(held.held[0], rescaled.scale["weight 0"]))
