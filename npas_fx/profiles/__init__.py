"""Profiles: the evidence behind the prices of candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from npas_fx.ir import Inventory, Profile
from npas_fx.profiles.structure import profile_structure

PROFILES: Mapping[str, Callable[[Inventory], Profile]] = {"structure": profile_structure}

__all__ = ["PROFILES"]
