"""Example inputs as plain data, so that a folder can hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

_NOT_HELD = "not held"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldInputs:
    """What a capture was given as examples.

    Attributes:
        structure: name of each argument -> its value as JSON, in which tensors stand by name; for
            one that cannot be written so, what in it cannot.
        tensors: copies on the CPU, by name.
    """

    structure: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def why_not_held(self, argument: str) -> str:
        """What of an argument cannot be held; empty if all can."""
        written = self.structure[argument]
        return str(written[_NOT_HELD]) if isinstance(written, dict) and _NOT_HELD in written else ""

    def read(self, argument: str, device: torch.device | str) -> Any:
        """Make the value of an argument.

        Args:
            argument: its name.
            device: of the model; tensors that were on the device of the model are put there.

        Raises:
            Exception: the data is not what ``hold_inputs`` writes.
        """
        return _Reader(self.tensors, device).read(self.structure[argument])


def hold_inputs(arguments: Mapping[str, Any], device: torch.device | str) -> HeldInputs:
    """Copy example inputs into plain data, so that later changes of them make no difference.

    Args:
        arguments: name -> value.
        device: of the model.
    """
    structure: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in arguments.items():
        writer = _Writer(name, torch.device(device))
        try:
            structure[name] = writer.write(value, name)
        except _NotHeldError as err:
            structure[name] = {_NOT_HELD: str(err)}
        else:
            tensors.update(writer.tensors)
    return HeldInputs(structure=structure, tensors=tensors)


class _NotHeldError(Exception):
    """A value cannot be written as plain data."""


class _Writer:
    """Writes a value as JSON; a value of a type that JSON does not have becomes ``{type: …}``."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self._name_of: dict[int, str] = {}  # what is given twice is one tensor

    def write(self, value: Any, path: str) -> Any:
        kind = type(value)  # exactly: of a subclass more would have to be known
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind in _AS_TEXT:
            return {kind.__name__: _AS_TEXT[kind](value)}
        if kind is complex:
            return {"complex": [self.write(part, path) for part in (value.real, value.imag)]}
        if kind in (list, tuple, torch.Size):
            items = [self.write(item, f"{path}[{k}]") for k, item in enumerate(value)]
            return items if kind is list else {kind.__name__: items}
        if kind is dict:
            pairs = [
                (self.write(k, path), self.write(v, f"{path}[{k!r}]")) for k, v in value.items()
            ]
            return {"dict": pairs}
        if kind is Tensor:
            return {"Tensor": self._write_tensor(value, path)}
        raise _NotHeldError(f"{path} (a {kind.__name__})")

    def _write_tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        is_plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
        if not is_plain or not _can_hold(tensor.dtype):
            raise _NotHeldError(
                f"{path} (a {tensor.dtype} tensor, {tensor.layout} on {tensor.device})"
            )
        name = self._name_of.setdefault(id(tensor), f"{self.name}.{len(self.tensors)}")
        if name not in self.tensors:
            value = tensor.detach().resolve_conj().resolve_neg()
            self.tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {
            "name": name,
            "is_beside_model": tensor.device == self.device,
            "requires_grad": tensor.requires_grad,
        }


# Types whose values are written as text.
_AS_TEXT: Mapping[type, Callable[[Any], str]] = {
    float: repr,
    bytes: bytes.hex,
    torch.dtype: lambda value: str(value).removeprefix("torch."),
    torch.device: str,
}


@cache
def _can_hold(dtype: torch.dtype) -> bool:
    try:
        return load(save({"it": torch.empty(0, dtype=dtype)}))["it"].dtype == dtype
    except Exception:
        return False


class _Reader:
    """Makes the values again that a writer has written."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._tensors = tensors
        self._device = device
        self._known: dict[str, Tensor] = {}

    def read(self, written: Any) -> Any:
        if isinstance(written, list):
            return [self.read(item) for item in written]
        if not isinstance(written, dict):
            return written
        ((kind, value),) = written.items()
        if kind in _FROM_TEXT:
            return _FROM_TEXT[kind](value)
        if kind == "dict":
            return {self.read(key): self.read(item) for key, item in value}
        if kind == "Tensor":
            return self._read_tensor(**value)
        items = self.read(value)
        return complex(*items) if kind == "complex" else _SEQUENCES[kind](items)

    def _read_tensor(self, name: str, is_beside_model: bool, requires_grad: bool) -> Tensor:
        if name not in self._known:
            tensor = self._tensors[name].to(self._device if is_beside_model else "cpu", copy=True)
            self._known[name] = tensor.requires_grad_(requires_grad)
        return self._known[name]


_FROM_TEXT: Mapping[str, Callable[[str], Any]] = {
    "float": float,
    "bytes": bytes.fromhex,
    "dtype": {name: v for name, v in vars(torch).items() if isinstance(v, torch.dtype)}.__getitem__,
    "device": torch.device,
}
_SEQUENCES: Mapping[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "Size": torch.Size}
