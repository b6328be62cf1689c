"""The lists of runs, each in the order of what is learned first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from npas_fx.generators import GENERATORS
from quality.records import Run, write_options
from quality.tasks import find_recipe

SEEDS = (0, 1, 2)
BELOW = (0.25, 0.1, 0.5)
BASELINES_BELOW = (
    "narrower",
    "shallower",
    "tied_runs",
    "tied_by_role",
    "low_rank",
    "one_bank",
    "random_groups",
    "ssn",
)
BASELINES_ABOVE = ("overparameterized", "one_bank", "random_groups", "ssn")
# Of trials: seeds and, for each method, learning rates and decays, as multiples of the recipe's.
TRIAL_SEEDS = (100, 101, 102)
TRIAL_RATES = ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.2))
TRIAL_SHARE = 0.3  # of the recipe's steps
# Ways to group by hand; see ``make_groups``.
GROUPINGS = ("runs", "place", "role", "shape", "kind")
FULL_SETTINGS = {"characters": ("full",), "cifar": ("wide", "resnet")}
# Learning rate of coefficients, from the list of that name: of all methods that have some.
MIXING = ("ours", "one_bank", "random_groups", "ssn")
COEFFICIENT_LR = {"characters": 5.0}
# Task and method -> rates that were better than the recipe's in trials, for the results.
CHOSEN_RATES = {
    ("characters", "plain"): (0.5, 1.0),
    ("characters", "overparameterized"): (0.5, 1.0),
    ("characters", "ours"): (0.5, 1.0),
    ("characters", "shallower"): (0.5, 1.0),
    ("characters", "low_rank"): (0.5, 1.0),
    ("characters", "one_bank"): (0.5, 1.0),
    ("characters", "random_groups"): (0.5, 1.0),
    ("characters", "tied_runs"): (1.0, 0.2),
    **{
        ("cifar", method): (2.0, 1.0)
        for method in ("plain", "ours", "overparameterized", *BASELINES_BELOW)
    },
}


def make_run(
    study: str,
    task: str,
    method: str,
    budget: float,
    seed: int,
    *,
    setting: str = "small",
    rates: tuple[float, float] = (1.0, 1.0),
    share_of_steps: float = 1.0,
    reads_test: bool = False,
    **options: object,
) -> Run:
    """A run by the task's recipe; ``rates`` are multiples of its learning rate and decay."""
    recipe = find_recipe(task, setting)
    return Run(
        study=study,
        task=task,
        setting=setting,
        method=method,
        budget=budget,
        seed=seed,
        steps=round(share_of_steps * recipe.steps),
        lr=recipe.lr * rates[0],
        weight_decay=recipe.weight_decay * rates[1],
        options=write_options(**options),
        reads_test=reads_test,
    )


def list_trials(task: str) -> Iterator[Run]:
    """Learning rates and decays, the same ones for each method."""
    budget_of = dict.fromkeys(("ours", *BASELINES_BELOW), 0.25)
    budget_of |= {"plain": 1.0, "overparameterized": 2.0}
    for rates in TRIAL_RATES:
        for method, budget in budget_of.items():
            yield make_run(
                "trials",
                task,
                method,
                budget,
                TRIAL_SEEDS[0],
                rates=rates,
                share_of_steps=TRIAL_SHARE,
                **(_rate_of_coefficients(task, budget) if method in MIXING else {}),
            )


def list_coefficients(task: str) -> Iterator[Run]:
    """Learning rate and decay of coefficients; gains trained or fixed."""
    for seed in TRIAL_SEEDS:
        for options in (
            {},
            {"coefficient_lr": 5.0},
            {"coefficient_lr": 2.0},
            {"coefficient_lr": 10.0},
            {"gain": "trained"},
            {"coefficient_decay": find_recipe(task, "small").weight_decay},
        ):
            for budget in (0.25, 0.1):
                yield make_run("coefficients", task, "ours", budget, seed, **options)


def list_generators(task: str) -> Iterator[Run]:
    """Which generators the solver may choose from."""
    for seed in TRIAL_SEEDS:
        for budget in BELOW:
            for generators in (None, ["tied", "wavg"], ["wavg"]):
                options: dict[str, Any] = {"generators": generators} if generators else {}
                yield _make_like_ours("generators", task, "ours", budget, seed, **options)


def list_each_generator(task: str) -> Iterator[Run]:
    """Each generator by itself; at 100 % all of them give the plain network."""
    for_searching = ("dedicated", "superweight_shared")
    names = [name for name in GENERATORS if name not in for_searching]
    for budget in (*BELOW, 2.0):
        for name in names:
            yield _make_like_ours(
                "each_generator", task, "ours", budget, TRIAL_SEEDS[0], generator=name
            )
    yield _make_like_ours("each_generator", task, "plain", 1.0, TRIAL_SEEDS[0])


def list_templates(task: str) -> Iterator[Run]:
    """Few templates for few weights, or many for many: the same number of parameters."""
    for seed in TRIAL_SEEDS:
        for budget in BELOW:
            for by in GROUPINGS:
                yield _make_like_ours("templates", task, "groups", budget, seed, by=by)


def list_above(task: str) -> Iterator[Run]:
    """Which weights share where there are more parameters than the network has."""
    for seed in TRIAL_SEEDS:
        for method in ("plain", "overparameterized", "ours"):
            budget = 1.0 if method == "plain" else 2.0
            yield _make_like_ours("above", task, method, budget, seed)
        for by in GROUPINGS:
            for rate in (1.0, 5.0):
                options: dict[str, Any] = {"by": by, "coefficient_lr": rate}
                yield _make_like_ours("above", task, "groups", 2.0, seed, **options)


def list_prices(task: str) -> Iterator[Run]:
    """Forty random plans at each of three budgets, trained briefly."""
    for draw in range(40):
        for budget in BELOW:
            yield _make_like_ours(
                "prices",
                task,
                "random_plan",
                budget,
                TRIAL_SEEDS[0],
                share_of_steps=TRIAL_SHARE,
                draw=draw,
            )


def _make_like_ours(
    study: str,
    task: str,
    method: str,
    budget: float,
    seed: int,
    *,
    share_of_steps: float = 1.0,
    **options: object,
) -> Run:
    """A run at the rates that this method, or else ours, has in the results."""
    rates = CHOSEN_RATES.get((task, method), CHOSEN_RATES.get((task, "ours"), (1.0, 1.0)))
    own = {} if method in ("plain", "overparameterized") else _rate_of_coefficients(task, budget)
    return make_run(
        study,
        task,
        method,
        budget,
        seed,
        rates=rates,
        share_of_steps=share_of_steps,
        **{**own, **options},
    )


def list_results(task: str) -> Iterator[Run]:
    """Ours and all baselines at all budgets; reads the test set."""
    below = [(method, budget) for budget in BELOW for method in ("ours", *BASELINES_BELOW)]
    above = [(method, 2.0) for method in ("ours", *BASELINES_ABOVE)]
    for seed in SEEDS:
        for method, budget in (("plain", 1.0), *below, *above, ("ours", 1.0)):
            trained_as = "plain" if budget == 1 else method  # at 100 % ours is the plain network
            rates = CHOSEN_RATES.get((task, trained_as), (1.0, 1.0))
            own = _rate_of_coefficients(task, budget) if method in MIXING else {}
            yield make_run(
                "results", task, method, budget, seed, rates=rates, reads_test=True, **own
            )


def list_full(task: str) -> Iterator[Run]:
    """The settings for a GPU at the recipes' own rates; read the test set."""
    for seed in SEEDS:
        for setting in FULL_SETTINGS[task]:
            for method, budget in (
                ("plain", 1.0),
                *((m, 0.25) for m in ("ours", *BASELINES_BELOW)),
            ):
                own = _rate_of_coefficients(task, budget) if method in MIXING else {}
                yield make_run(
                    "results", task, method, budget, seed, setting=setting, reads_test=True, **own
                )


def _rate_of_coefficients(task: str, budget: float) -> dict[str, Any]:
    """Options of methods whose weights are mixed; at 100 % ours mixes none."""
    return {"coefficient_lr": COEFFICIENT_LR[task]} if budget < 1 and task in COEFFICIENT_LR else {}


LISTS: Mapping[str, Callable[[str], Iterator[Run]]] = {
    "trials": list_trials,
    "coefficients": list_coefficients,
    "generators": list_generators,
    "each_generator": list_each_generator,
    "templates": list_templates,
    "above": list_above,
    "prices": list_prices,
    "results": list_results,
    "full": list_full,
}
