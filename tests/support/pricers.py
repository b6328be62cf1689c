"""What counts and prices the banks of an inventory, as ``npas_fx.plan`` does."""

from __future__ import annotations

from npas_fx.generators import DEFAULT_GENERATORS, GENERATORS
from npas_fx.profiles.structure import profile_structure
from npas_fx.propose import Pricer
from npas_fx.rules import Rules


def pricer_of(rules: Rules, *, above: bool = False) -> Pricer:
    return Pricer(
        rules=rules,
        profile=profile_structure(rules.inventory),
        generators=tuple(GENERATORS[name] for name in DEFAULT_GENERATORS),
        above=above,
    )
