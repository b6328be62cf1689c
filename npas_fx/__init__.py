"""Neural Parameter Allocation Search as a compiler pass for PyTorch models."""

from npas_fx.api import (
    apply,
    inspect,
    load,
    materialize,
    param_groups,
    plan,
    plan_frontier,
    plan_of,
    save,
    transform,
    weights_of,
)
from npas_fx.errors import (
    BudgetError,
    CaptureError,
    CaptureWarning,
    GuardError,
    InfeasibleBudgetError,
    NPASError,
    PlanError,
    RewriteError,
    RuleError,
    SolverWarning,
    StorageError,
    StorageWarning,
    VerificationError,
)
from npas_fx.ir import BankPlan, Budget, Inventory, Plan

__version__ = "0.1.0"

__all__ = [
    "BankPlan",
    "Budget",
    "BudgetError",
    "CaptureError",
    "CaptureWarning",
    "GuardError",
    "InfeasibleBudgetError",
    "Inventory",
    "NPASError",
    "Plan",
    "PlanError",
    "RewriteError",
    "RuleError",
    "SolverWarning",
    "StorageError",
    "StorageWarning",
    "VerificationError",
    "apply",
    "inspect",
    "load",
    "materialize",
    "param_groups",
    "plan",
    "plan_frontier",
    "plan_of",
    "save",
    "transform",
    "weights_of",
]
