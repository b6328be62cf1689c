from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from quality.lists import COEFFICIENT_LR, LISTS, MIXING, make_run
from quality.methods import METHODS
from quality.records import Run, write_options
from quality.tasks import find_recipe

TASKS = ("characters", "cifar")
BASELINES = {
    "narrower",
    "shallower",
    "tied_runs",
    "tied_by_role",
    "low_rank",
    "one_bank",
    "random_groups",
    "ssn",
}
EVERY_LIST = [(name, task) for name in LISTS for task in TASKS]


def list_runs(name: str, task: str) -> list[Run]:
    return list(LISTS[name](task))


@pytest.mark.parametrize(("name", "task"), EVERY_LIST)
def test_runs_can_be_made(name: str, task: str) -> None:
    runs = list_runs(name, task)
    assert runs
    for run in runs:
        assert run.study == ("results" if name == "full" else name)
        assert run.task == task
        assert run.method in METHODS
        recipe = find_recipe(run.task, run.setting)
        assert 0 < run.steps <= recipe.steps
        assert 0.1 * recipe.lr <= run.lr <= 10 * recipe.lr
        assert run.budget > 0


@pytest.mark.parametrize(("name", "task"), EVERY_LIST)
def test_no_run_is_listed_twice(name: str, task: str) -> None:
    assert [run for run, number in Counter(list_runs(name, task)).items() if number > 1] == []


@pytest.mark.parametrize(("name", "task"), EVERY_LIST)
def test_options_are_written_in_one_way(name: str, task: str) -> None:
    for run in list_runs(name, task):
        assert run.options == write_options(**json.loads(run.options))


@pytest.mark.parametrize("task", TASKS)
def test_no_choice_is_made_on_seeds_of_results(task: str) -> None:
    seeds = {name: {run.seed for run in list_runs(name, task)} for name in LISTS}
    for name in ("trials", "coefficients", "templates"):
        assert not seeds[name] & seeds["results"]


@pytest.mark.parametrize(("name", "task"), EVERY_LIST)
def test_results_alone_read_the_test_set(name: str, task: str) -> None:
    assert {run.reads_test for run in list_runs(name, task)} == {name in ("results", "full")}


@pytest.mark.parametrize("task", TASKS)
def test_results_have_ours_and_all_baselines_at_each_budget_for_three_seeds(task: str) -> None:
    runs = list_runs("results", task)
    seeds = {run.seed for run in runs}
    assert len(seeds) == 3
    found = {(run.method, run.budget, run.seed) for run in runs if run.budget < 1}
    expected = {
        (method, budget, seed)
        for method in {"ours", *BASELINES}
        for budget in (0.1, 0.25, 0.5)
        for seed in seeds
    }
    assert found == expected
    assert {run.seed for run in runs if run.method == "plain"} == seeds


@pytest.mark.parametrize("task", TASKS)
def test_all_of_a_cell_of_the_results_have_the_same_seeds(task: str) -> None:
    seeds = defaultdict(set)
    for run in list_runs("results", task):
        seeds[run.method, run.budget].add(run.seed)
    assert len({frozenset(own) for own in seeds.values()}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_all_results_are_trained_alike_at_rates_that_were_tried(task: str) -> None:
    recipe = find_recipe(task, "small")
    tried = {(run.method, run.lr, run.weight_decay) for run in list_runs("trials", task)}
    rates_of = defaultdict(set)
    for run in list_runs("results", task):
        assert (run.steps, run.setting) == (recipe.steps, "small")
        mixes = run.method in MIXING and run.budget < 1
        rate = COEFFICIENT_LR.get(task) if mixes else None
        assert run.option == ({} if rate is None else {"coefficient_lr": rate})
        method = "plain" if run.budget == 1 else run.method  # all dedicated, it is the plain one
        rates_of[method].add((run.lr, run.weight_decay))
    for method, rates in rates_of.items():
        assert len(rates) == 1  # whatever the seed and the budget
        default = (method, recipe.lr, recipe.weight_decay)
        assert all((method, *each) in tried | {default} for each in rates)


@pytest.mark.parametrize("task", TASKS)
def test_each_method_has_the_same_trials(task: str) -> None:
    trials = defaultdict(list)
    for run in list_runs("trials", task):
        trials[run.method].append((run.lr, run.weight_decay, run.seed, run.steps))
    assert set(trials) == {"plain", "ours", "overparameterized", *BASELINES}
    (first, *others) = trials.values()
    assert len(first) > 1
    assert all(other == first for other in others)


@pytest.mark.parametrize("task", TASKS)
def test_rates_are_multiples_of_the_recipe(task: str) -> None:
    recipe = find_recipe(task, "small")
    run = make_run("study", task, "ours", 0.5, 7, rates=(2.0, 0.5), share_of_steps=0.25, by="role")
    assert (run.lr, run.weight_decay) == (2 * recipe.lr, 0.5 * recipe.weight_decay)
    assert run.steps == recipe.steps // 4
    assert (run.method, run.budget, run.seed, run.option) == ("ours", 0.5, 7, {"by": "role"})
