"""Banks: the trainable templates from which the weights of several sites are generated."""

from npas_fx.banks.bank import Bank

__all__ = ["Bank"]
