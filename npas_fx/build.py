"""Build: check a plan against a model, and make the banks that it wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from npas_fx.banks import Bank
from npas_fx.errors import NPASError, PlanError
from npas_fx.generators import Generator
from npas_fx.generators.generator import num_parameters, shapes_of
from npas_fx.ir import BankPlan, Inventory, Kept, Plan, Site


def check_plan(plan: Plan, inventory: Inventory, generators: Mapping[str, Generator]) -> None:
    """Refuse a plan that does not fit the model, or whose numbers are wrong.

    Args:
        plan: perhaps written for another model, or edited.
        inventory: of the model, all sites included.
        generators: name -> generator.

    Raises:
        PlanError: with the bank or weight, what is wrong and what would be right.
    """
    sites = {site.name: site for site in inventory.sites}
    stays = {kept.name: kept for kept in inventory.kept}
    for index, bank in enumerate(plan.banks):
        where = f"banks[{index}]"
        if not bank.sites:
            raise PlanError(f"{where} has no sites; remove it")
        for name in bank.sites:
            if name in stays:
                reason = stays[name].reason
                raise PlanError(
                    f"{where}: {name!r} cannot be generated ({reason}); list it in kept"
                )
            if name not in sites:
                raise PlanError(f"{where}: the model has no weight {name!r}")
        check_bank(where, bank, [sites[name] for name in bank.sites], generators)
    planned = {name for bank in plan.banks for name in bank.sites} | set(plan.kept)
    for name in (*sites, *stays):
        if name not in planned:
            raise PlanError(f"the plan does not mention {name!r}; put it into a bank or into kept")
    kept: list[Site | Kept] = []
    for name in plan.kept:
        if name not in sites and name not in stays:
            raise PlanError(f"kept: the model has no parameter {name!r}")
        kept.append(sites[name] if name in sites else stays[name])
    trainable = [item for item in kept if isinstance(item, Site) or item.is_trainable]
    shared = [name for bank in plan.banks if not bank.is_dedicated for name in bank.sites]
    for field, total in (
        ("kept_parameters", sum(item.numel for item in trainable)),
        ("kept_bytes", sum(item.num_bytes for item in trainable)),
        ("model_parameters", inventory.num_parameters),
        ("site_parameters", sum(sites[n].numel for bank in plan.banks for n in bank.sites)),
        ("fresh_parameters", sum(sites[name].numel for name in shared)),
    ):
        if total != getattr(plan, field):
            raise PlanError(
                f"the plan says {field}={getattr(plan, field)}, but it is {total}; write that"
            )
    spent = getattr(plan, plan.budget.resource)
    if spent > plan.budget.amount:
        raise PlanError(
            f"the plan needs {spent} {plan.budget.resource}, more than its budget of {plan.budget}"
        )


def check_bank(
    where: str,
    bank: BankPlan,
    sites: Sequence[Site],
    generators: Mapping[str, Generator],
    error: type[NPASError] = PlanError,
) -> None:
    """Refuse a bank that its weights cannot have, or whose numbers are wrong.

    Args:
        where: what messages call it.
        bank: to check.
        sites: its own.
        generators: name -> generator.
        error: what is raised.
    """
    generator = generators.get(bank.generator)
    if generator is None:
        raise error(f"{where}: no generator {bank.generator!r}; there are {', '.join(generators)}")
    if len({(site.dtype, site.device) for site in sites}) > 1:
        found = ", ".join(f"{site.name} {site.dtype} {site.device}" for site in sites)
        raise error(f"{where}: a bank has one dtype and one device, but: {found}")
    size, shapes = bank.size, shapes_of(sites, generator)
    is_negative = min(size.num_templates, size.template_size, size.num_partial, size.rank) < 0
    wrong = "no field is negative" if is_negative else generator.refuse(shapes, size)
    if wrong:
        raise error(f"{where}: {size} is no size for {bank.generator}: {wrong}")
    owned = num_parameters(generator, shapes, size)
    for resource, amount in (
        ("parameters", owned),
        ("bytes", owned * sites[0].dtype.itemsize),
    ):
        if getattr(bank, resource) != amount:
            raise error(
                f"{where} says {resource}={getattr(bank, resource)}, but for the weights of this "
                f"model it owns {amount}; write that number, or use it with its own model"
            )


def build_banks(
    plan: Plan,
    inventory: Inventory,
    generators: Mapping[str, Generator],
    device: torch.device | None = None,
) -> dict[str, Bank]:
    """Make the plan's shared banks, with undefined values, in the plan's order.

    Args:
        plan: checked.
        inventory: of the model.
        generators: name -> generator.
        device: of all banks; by default each is on the device of its sites.
    """
    sites = {site.name: site for site in inventory.sites}
    shared = [bank for bank in plan.banks if not bank.is_dedicated]
    return {
        f"bank{index}": Bank(
            generators[bank.generator],
            [sites[name].shape for name in bank.sites],
            bank.size,
            parts=[(sites[name].num_parts, sites[name].parts_axis) for name in bank.sites],
            dtype=sites[bank.sites[0]].dtype,
            device=device or sites[bank.sites[0]].device,
            held_rows={
                place: row
                for place, row in enumerate(sites[name].held_row for name in bank.sites)
                if row is not None
            },
        )
        for index, bank in enumerate(shared)
    }


def give_birth(
    banks: Mapping[str, Bank], plan: Plan, weights: Mapping[str, torch.Tensor], seed: int
) -> None:
    """Draw the tensors of all banks, so that each weight keeps its mean and deviation.

    Args:
        banks: as built from the plan.
        plan: the same.
        weights: name of a site -> the weight that the generated one replaces.
        seed: the same seed, plan and weights give the same banks.
    """
    random = torch.Generator().manual_seed(seed)
    shared = [bank for bank in plan.banks if not bank.is_dedicated]
    for bank, planned in zip(banks.values(), shared, strict=True):
        bank.birth([weights[name] for name in planned.sites], random)
