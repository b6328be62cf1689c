"""The values that flow from step to step: budget, inventory, candidates, plan."""

from npas_fx.ir.bank_plan import BankPlan, Certificate, Plan
from npas_fx.ir.budget import Budget
from npas_fx.ir.candidate import Candidate, Mixture, Profile
from npas_fx.ir.inventory import Inventory, Kept, Opaque, Repeats, Site
from npas_fx.ir.size import Size

__all__ = [
    "BankPlan",
    "Budget",
    "Candidate",
    "Certificate",
    "Inventory",
    "Kept",
    "Mixture",
    "Opaque",
    "Plan",
    "Profile",
    "Repeats",
    "Site",
    "Size",
]
