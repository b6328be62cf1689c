from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import npas_fx
from npas_fx.generators import Moments
from npas_fx.generators.wavg import WeightedAverage
from npas_fx.ir import Site, Size
from quality import by_hand
from quality.contestant import Contestant, count_parameters
from quality.methods import METHODS
from quality.plans import read_banks
from quality.sharing import TrainedGain
from quality.tasks import compute_loss, iterate_batches
from quality.training import Rates, Training
from small_tasks import STEPS, TASKS, assign, make_characters, make_model

torch.set_num_threads(1)

OPTIONS: dict[str, dict[str, Any]] = {"groups": {"by": "role"}, "random_plan": {"draw": 1}}
# What they own is exactly the budget.
EXACT = ("ours", "one_bank", "random_groups", "groups", "random_plan", "ssn")
SMALLER = ("narrower", "shallower", "tied_by_role", "tied_runs", "low_rank")
TIED = ("tied_by_role", "tied_runs")
CASES = [
    *((method, "characters", 0.25) for method in (*EXACT, *SMALLER)),
    *((method, "pictures", 0.5) for method in (*EXACT, *SMALLER) if method not in TIED),
    *((method, "characters", 0.5) for method in ("ssn", "low_rank")),
    *((method, "characters", 2.0) for method in ("ours", "random_groups", "overparameterized")),
    *((method, "pictures", 2.0) for method in ("one_bank", "ssn", "overparameterized")),
]
DRAWING = ("one_bank", "random_groups", "ssn", "overparameterized", "narrower", "ours")


@dataclass(frozen=True)
class Built:
    contestant: Contestant
    model: nn.Module
    before: dict[str, Tensor]
    budget: int


@cache
def build(method: str, task: str, share: float, seed: int = 0) -> Built:
    """What a method makes; nobody changes it."""
    model = make_model(TASKS[task])
    before = copy.deepcopy(model.state_dict())
    given = assign(TASKS[task], model, share, seed, **OPTIONS.get(method, {}))
    return Built(METHODS[method](given), model, before, given.budget)


def is_equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def sites_of(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in npas_fx.inspect(model).sites}


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and columns of each weight of a layer."""
    layers = ((name, part) for name, part in model.named_modules())
    return {
        f"{name}.weight": (len(part.weight), part.weight[0].numel())
        for name, part in layers
        if isinstance(part, nn.Linear | nn.Conv2d)
    }


def standardize(weight: Tensor) -> Tensor:
    return (weight - weight.mean()) / weight.std()


def test_the_cases_name_each_method() -> None:
    assert {method for method, *_ in CASES} | {"plain"} == set(METHODS)


@pytest.mark.parametrize(("method", "task", "share"), CASES)
def test_parameters_stay_within_the_budget(method: str, task: str, share: float) -> None:
    built = build(method, task, share)
    owned = count_parameters(built.contestant.module)
    assert 0 < owned <= built.budget
    if method == "ssn":
        # One entry more may bring a coefficient for each layer with it.
        assert owned >= built.budget - len(matrices(built.model))
    elif method in EXACT:
        assert owned == built.budget


@pytest.mark.parametrize(("method", "task", "share"), CASES)
def test_all_parameters_are_used_and_trained(method: str, task: str, share: float) -> None:
    module = copy.deepcopy(build(method, task, share).contestant.module).train()
    batch = next(iterate_batches(TASKS[task], 1, 0))
    loss = compute_loss(module, batch, TASKS[task].recipe)
    loss.backward()
    assert math.isfinite(loss.item())
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any(), name


@pytest.mark.parametrize(("method", "task", "share"), CASES)
def test_the_plain_network_is_left_as_it_is(method: str, task: str, share: float) -> None:
    built = build(method, task, share)
    now = built.model.state_dict()
    assert now.keys() == built.before.keys()
    assert all(torch.equal(value, built.before[name]) for name, value in now.items())
    assert all(p.grad is None and p.requires_grad for p in built.model.parameters())
    own = {tensor.data_ptr() for tensor in built.contestant.module.parameters()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in built.model.parameters())


@pytest.mark.parametrize(("method", "task", "share"), CASES)
def test_coefficients_are_parameters_that_mix(method: str, task: str, share: float) -> None:
    contestant = build(method, task, share).contestant
    own = {id(parameter): name for name, parameter in contestant.module.named_parameters()}
    names = [own[id(parameter)] for parameter in contestant.coefficients]
    assert len(set(names)) == len(names)
    parts = {"coefficients", "gain", "alpha"}
    # A list's own entries are called by number: weights.coefficients.0.
    assert set(names) == {name for name in own.values() if parts & set(name.split(".")[-2:])}


@pytest.mark.parametrize("method", DRAWING)
def test_the_seed_says_what_is_drawn(method: str) -> None:
    share = 2.0 if method == "overparameterized" else 0.25
    first = build(method, "characters", share)
    given = assign(TASKS["characters"], make_model(TASKS["characters"]), share)
    again = METHODS[method](given)
    assert is_equal(first.contestant.module, again.module)
    assert first.contestant.plan == again.plan
    other = build(method, "characters", share, 1)
    assert not is_equal(first.contestant.module, other.contestant.module)


@pytest.mark.parametrize("method", ["narrower", "shallower", "low_rank", "tied_by_role"])
def test_budgets_that_no_network_meets_are_refused(method: str) -> None:
    model = make_model(TASKS["characters"])
    with pytest.raises(ValueError, match=r"\b10\b parameters"):
        METHODS[method](replace(assign(TASKS["characters"], model, 1.0), budget=10))


def test_plain_is_the_plain_network() -> None:
    model = make_model(TASKS["characters"])
    for share in (0.1, 1.0, 2.0):
        assert METHODS["plain"](assign(TASKS["characters"], model, share)).module is model


@pytest.mark.parametrize("share", [0.07, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0, 2.0])
def test_narrower_is_the_widest_that_fits(share: float) -> None:
    task = make_characters(num_heads=1)
    given = assign(task, make_model(task), share)
    made = METHODS["narrower"](given).module
    width = made.head.in_features
    assert len(made.blocks) == task.depth
    assert width <= task.width
    assert count_parameters(made) <= given.budget
    if width < task.width:
        assert count_parameters(task.make(width + 1, task.depth)) > given.budget


@pytest.mark.parametrize("share", [0.03, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0])
def test_shallower_has_the_fewest_layers_that_use_nine_tenths(share: float) -> None:
    task = make_characters(num_heads=1)
    given = assign(task, make_model(task), share)
    made = METHODS["shallower"](given).module
    counts = {
        (depth, width): count_parameters(task.make(width, depth))
        for depth in task.depths
        for width in task.widths
    }
    fitting = {key: count for key, count in counts.items() if count <= given.budget}
    enough = [depth for (depth, _), count in fitting.items() if count >= 0.9 * given.budget]
    depth, width = len(made.blocks), made.head.in_features
    if enough:
        assert depth == min(enough)
        assert width == max(w for d, w in fitting if d == depth)
    else:
        assert counts[depth, width] == max(fitting.values())


def group_weights(model: nn.Module) -> list[list[str]]:
    """Names of one role and shape, in the order of their depth."""
    groups: dict[object, list[str]] = {}
    for site in sorted(npas_fx.inspect(model).sites, key=lambda site: site.depth):
        groups.setdefault((site.role, site.shape), []).append(site.name)
    return list(groups.values())


def cut(groups: list[list[str]], length: int) -> list[list[str]]:
    return [g[k : k + length] for g in groups for k in range(0, len(g), length)]


def count_tied(model: nn.Module, length: int) -> int:
    """Parameters with runs of one length tied, a gain for each tied weight."""
    count = count_parameters(model)
    for run in cut(group_weights(model), length):
        if len(run) > 1:
            count += len(run) - (len(run) - 1) * model.get_parameter(run[0]).numel()
    return count


def check_ties(shared: nn.Module, length: int) -> None:
    """Weights of a run are one weight but for gain and offset, those of two runs are not."""
    weights = npas_fx.weights_of(shared)
    plain = npas_fx.materialize(shared)
    runs = cut(group_weights(plain), length)
    assert set(weights) == {name for run in runs if len(run) > 1 for name in run}
    seen: list[Tensor] = []
    for run in runs:
        first, *others = (standardize(plain.get_parameter(name).detach()) for name in run)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3)
        same_shape = [each for each in seen if each.shape == first.shape]
        assert not any(torch.allclose(each, first, atol=1e-2) for each in same_shape)
        seen.append(first)
    templates = [p for name, p in shared.named_parameters() if name.endswith(".templates")]
    assert len(templates) == sum(len(run) > 1 for run in runs)
    assert all(len(each) == 1 for each in templates)


@pytest.mark.parametrize("share", [0.25, 2.0])
def test_all_weights_of_one_role_and_shape_are_tied(share: float) -> None:
    task = TASKS["characters"]
    built = build("tied_by_role", "characters", share)
    shared = built.contestant.module
    check_ties(shared, 100)
    counts = {width: count_tied(task.make(width, task.depth), 100) for width in task.widths}
    widest = max(width for width, count in counts.items() if count <= built.budget)
    assert shared.head.weight.shape[1] == widest
    assert count_parameters(shared) == counts[widest]


def test_the_longest_runs_that_use_nine_tenths_are_tied() -> None:
    task = TASKS["characters"]
    built = build("tied_runs", "characters", 0.25)
    shared = built.contestant.module
    models = {width: task.make(width, task.depth) for width in task.widths}
    for length in (100, 8, 6, 4, 3, 2):
        counts = {width: count_tied(model, length) for width, model in models.items()}
        widest = max(width for width, count in counts.items() if count <= built.budget)
        if counts[widest] >= 0.9 * built.budget:
            break
    assert length < 9  # a group has 9 weights: one at least is cut
    assert shared.head.weight.shape[1] == widest
    assert count_parameters(shared) == counts[widest]
    check_ties(shared, length)


@pytest.mark.parametrize(
    ("task", "share"), [("characters", 0.25), ("characters", 0.5), ("pictures", 0.5)]
)
def test_ranks_are_the_largest_share_of_the_full_ranks_that_fits_or_one_more(
    task: str, share: float
) -> None:
    built = build("low_rank", task, share)
    made = built.contestant.module.weights()
    sides = matrices(built.model)
    others = count_parameters(built.model) - sum(map(math.prod, sides.values()))
    assert set(made) <= set(sides)
    ranks = {name: int(torch.linalg.matrix_rank(w.flatten(1))) for name, w in made.items()}

    def choose(thousandths: int) -> dict[str, int]:
        """Ranks, but for weights that two factors do not make smaller."""
        of_full = {name: max(1, thousandths * min(pair) // 1000) for name, pair in sides.items()}
        return {
            name: rank
            for name, rank in of_full.items()
            if rank * sum(sides[name]) < math.prod(sides[name])
        }

    def count(chosen: dict[str, int]) -> int:
        return others + sum(
            chosen[name] * sum(pair) if name in chosen else math.prod(pair)
            for name, pair in sides.items()
        )

    largest = choose(max(k for k in range(1, 1001) if count(choose(k)) <= built.budget))
    assert all(ranks[name] - rank in (0, 1) for name, rank in largest.items())
    for name in ranks:  # those that were not raised do not fit
        if ranks[name] == largest[name]:
            assert count({**ranks, name: ranks[name] + 1}) > built.budget
    assert count_parameters(built.contestant.module) == count(ranks) <= built.budget


def test_one_bank_makes_all_weights() -> None:
    built = build("one_bank", "characters", 0.25)
    (bank,) = read_banks(built.contestant.plan)
    assert bank[0] == tuple(range(len(sites_of(built.model))))
    assert set(npas_fx.weights_of(built.contestant.module)) == set(sites_of(built.model))


def find_groups(contestant: Contestant) -> set[tuple[int, ...]]:
    return {sites for sites, *_ in read_banks(contestant.plan)}


def test_random_groups_are_drawn_and_as_many_as_the_root_of_the_number_of_weights() -> None:
    first, other = (
        find_groups(build("random_groups", "characters", 0.25, seed).contestant) for seed in (0, 1)
    )
    assert first != other
    assert len(first) == len(other) == round(math.sqrt(20))
    assert {len(group) for group in first} == {5}


@pytest.mark.parametrize(
    ("by", "key"),
    [
        ("role", lambda site: (site.role, site.shape)),
        ("shape", lambda site: site.shape),
        ("kind", lambda site: site.kind),
        ("place", lambda site: re.sub(r"\d+", "", site.name)),
    ],
)
def test_groups_are_what_the_option_says(by: str, key: Callable[[Site], object]) -> None:
    model = make_model(TASKS["characters"])
    made = METHODS["groups"](assign(TASKS["characters"], model, 0.25, by=by))
    groups: dict[object, list[int]] = {}
    for index, site in enumerate(npas_fx.inspect(model).sites):
        is_end = site.role in ("stem", "head", "embedding")
        groups.setdefault(site.name if is_end else key(site), []).append(index)
    assert find_groups(made) == {tuple(group) for group in groups.values()}


def test_groups_by_runs_have_four_weights_of_one_role_at_most() -> None:
    model = make_model(TASKS["characters"])
    made = METHODS["groups"](assign(TASKS["characters"], model, 0.25, by="runs"))
    number = {name: index for index, name in enumerate(sites_of(model))}
    runs = cut(group_weights(model), 4)
    found = {tuple(sorted(number[name] for name in run)) for run in runs}
    assert find_groups(made) == found


def test_the_option_draw_says_which_random_plan_it_is() -> None:
    first = build("random_plan", "pictures", 0.5).contestant
    model = make_model(TASKS["pictures"])
    other = METHODS["random_plan"](assign(TASKS["pictures"], model, 0.5, draw=2))
    assert other.plan != first.plan


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sums_of_templates_need_more_than_the_plain_network_has(share: float) -> None:
    model = make_model(TASKS["characters"])
    with pytest.raises(ValueError, match="not more than the plain network has"):
        METHODS["overparameterized"](assign(TASKS["characters"], model, share))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("share", [1.1, 1.5, 2.0, 3.7])
def test_sums_of_templates_use_the_budget_as_evenly_as_it_goes(task: str, share: float) -> None:
    model = make_model(TASKS[task])
    given = assign(TASKS[task], model, share)
    module = METHODS["overparameterized"](given).module
    left = given.budget - count_parameters(module)
    sums = module.weights
    counts = dict.fromkeys(matrices(model), 1)
    counts.update(zip(sums.names, map(len, sums.coefficients), strict=True))
    assert max(counts.values()) - min(counts.values()) <= 1
    # Nothing that has the fewest templates could get one more.
    for name, count in counts.items():
        cost = math.prod(matrices(model)[name]) + (2 if count == 1 else 1)
        assert 0 <= left < cost or count > min(counts.values())


@pytest.mark.parametrize(
    ("method", "task", "share"),
    [("low_rank", "characters", 0.5), ("overparameterized", "characters", 2.0)],
)
def test_operations_are_those_of_the_products(method: str, task: str, share: float) -> None:
    contestant = build(method, task, share).contestant
    with FlopCounterMode(display=False) as counter:
        contestant.module.weights()
    assert contestant.generation_flops == counter.get_total_flops() > 0


def test_networks_without_generated_weights_cost_nothing_more() -> None:
    for method in ("narrower", "shallower"):
        contestant = build(method, "characters", 0.25).contestant
        assert contestant.generation_flops == 0
        assert contestant.plan == ""
        assert contestant.coefficients == ()


@pytest.mark.parametrize(("task", "share"), [("characters", 0.25), ("pictures", 0.5)])
def test_searched_weights_start_with_the_deviation_of_the_plain_ones(
    task: str, share: float
) -> None:
    built = build("ssn", task, share)
    made = built.contestant.module.weights()
    assert made
    assert set(made) <= set(matrices(built.model))
    for name, weight in made.items():
        torch.testing.assert_close(weight.std(), built.model.get_parameter(name).std())


def test_the_search_takes_fifteen_percent_more_steps_at_the_rates_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[Training] = []
    monkeypatch.setattr(by_hand, "fit", taken.append)
    monkeypatch.setattr(by_hand, "SSN_GROUPS", 2)
    model = make_model(TASKS["characters"])
    given = replace(assign(TASKS["characters"], model, 0.5), rates=Rates(lr=0.5, weight_decay=0.25))
    assert len(METHODS["ssn"](given).module.weights.weights.banks) <= 2
    assert [each.steps for each in taken] == [round(0.15 * STEPS)]
    assert taken[0].rates == given.rates


@pytest.mark.parametrize(
    ("task", "share"), [("characters", 0.25), ("characters", 2.0), ("pictures", 0.5)]
)
def test_ours_is_the_default_transform(task: str, share: float) -> None:
    built = build("ours", task, share)
    expected = npas_fx.transform(built.model, built.budget, seed=0)
    assert is_equal(built.contestant.module, expected)
    assert npas_fx.plan_of(built.contestant.module) == npas_fx.plan_of(expected)


def test_ours_plans_with_the_generators_that_the_options_name() -> None:
    model = make_model(TASKS["characters"])
    given = assign(TASKS["characters"], model, 0.6, generators=["tied"])
    made = METHODS["ours"](given)
    assert made.plan != build("ours", "characters", 0.6).contestant.plan
    expected = npas_fx.transform(model, given.budget, generators=["tied"])
    assert is_equal(made.module, expected)


def test_gains_are_trained_where_the_options_say_so() -> None:
    model = make_model(TASKS["characters"])
    given = assign(TASKS["characters"], model, 0.25, gain="trained")
    made = METHODS["ours"](given)
    assert count_parameters(made.module) == given.budget
    generators = {generator for _, generator, _ in read_banks(made.plan)}
    assert "wavg_gain" in generators
    assert generators <= {"wavg_gain", "tied", "dedicated"}
    gains = [p for name, p in made.module.named_parameters() if name.endswith(".gain")]
    assert gains
    assert {id(gain) for gain in gains} <= {id(parameter) for parameter in made.coefficients}
    assert not any(name.endswith(".gain") for name, _ in made.module.named_buffers())
    for name, weight in npas_fx.weights_of(made.module).items():
        plain = model.get_parameter(name)
        torch.testing.assert_close(weight.std(), plain.std())
        assert abs((weight.mean() - plain.mean()).item()) < 0.03 * plain.std().item()


@pytest.mark.parametrize("size", [(2, 12, 0), (3, 5, 4)])
def test_trained_gains_start_and_generate_as_constant_ones(size: tuple[int, int, int]) -> None:
    num_templates, template_size, num_partial = size
    shapes = [(3, 4), (4, 3), (2, 6)]
    of = Size(num_templates=num_templates, template_size=template_size, num_partial=num_partial)
    moments = [Moments(mean=0.1 * k, std=1.0 + k) for k in range(3)]
    drawn = [
        generator.birth(shapes, of, moments, torch.Generator().manual_seed(3))
        for generator in (TrainedGain(), WeightedAverage())
    ]
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    trained, fixed = TrainedGain(), WeightedAverage()
    torch.testing.assert_close(
        trained.generate(drawn[0], shapes, of), fixed.generate(drawn[1], shapes, of)
    )
    own = set(trained.parameters(shapes, of)) - set(fixed.parameters(shapes, of))
    assert own == set(fixed.buffers(shapes, of)) - set(trained.buffers(shapes, of)) == {"gain"}
    assert trained.parameters(shapes, of)["gain"] == (3,)
