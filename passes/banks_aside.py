"""Banks that belong to a module of the user's class, and are not among its children."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from npas_fx.passes.live_weights import LiveWeights

_ASIDE = "_npas_fx_aside"


def put_aside(module: BanksAside, name: str, live: LiveWeights) -> None:
    """Give a module the banks of ``live``, under a name that it does not use."""
    vars(module)[_ASIDE] = name, live
    vars(module)[name] = live.banks


def live_weights_of(module: BanksAside) -> LiveWeights:
    """What generates the weights of the module."""
    live: LiveWeights = vars(module)[_ASIDE][1]
    return live


class BanksAside(nn.Module):
    """Base of classes that train banks and save them, but do not show them to the user's code.

    A ``forward`` that runs all children, or looks at all parameters, finds those of the plain
    model; so does what iterates over an ``nn.Sequential``.
    """

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the user's children; outside of ``forward`` the banks too."""
        yield from super().named_children()
        name, live = vars(self)[_ASIDE]
        if not live.is_in_forward():
            yield name, live.banks

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the user's modules; outside of ``forward`` the banks too."""
        memo = set() if memo is None else memo
        is_new = self not in memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        name, live = vars(self)[_ASIDE]
        if is_new and not live.is_in_forward():
            inside = f"{prefix}.{name}" if prefix else name
            yield from live.banks.named_modules(memo, inside, remove_duplicate)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name, live = vars(self)[_ASIDE]
        live.banks.state_dict(
            destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys)
        super()._load_from_state_dict(*given, error_msgs)
        name, live = vars(self)[_ASIDE]
        inside = f"{prefix}{name}"
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(f"{inside}.")]
        for path, module in live.banks.named_modules(prefix=inside):
            given = (state_dict, f"{path}.", local_metadata, strict, missing_keys, unexpected_keys)
            module._load_from_state_dict(*given, error_msgs)
