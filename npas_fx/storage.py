"""Storage: an emitted module as a folder of safetensors and JSON, without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from npas_fx.banks import Bank
from npas_fx.errors import PlanError, StorageError, StorageWarning
from npas_fx.ir import Plan
from npas_fx.passes.capture import Capture
from npas_fx.passes.emitted import EmitOptions, EmittedModule, emission_of
from npas_fx.passes.held_inputs import HeldInputs
from npas_fx.passes.rebinding import names_set_by_calls
from npas_fx.passes.skeleton import device_of

PLAN, CAPTURE, WEIGHTS = "plan.json", "capture.json", "weights.safetensors"
INPUTS, INPUT_TENSORS = "inputs.json", "inputs.safetensors"
_EXAMPLE = ("example_inputs", "example_kwargs")  # one example


def write_folder(module: EmittedModule, folder: str | os.PathLike[str]) -> None:
    """Write plan, capture report, example inputs and all tensors; see ``npas_fx.save``."""
    target = Path(folder)
    emission = emission_of(module)
    inputs = emission.capture.inputs
    captured = {**emission.capture.report(), "options": asdict(emission.options)}
    texts = {
        INPUTS: json.dumps(inputs.structure, indent=2, allow_nan=False) + "\n",
        CAPTURE: json.dumps(captured, indent=2, ensure_ascii=False) + "\n",
        PLAN: emission.plan.to_json(),
    }
    given = save(dict(inputs.tensors))
    tensors = {
        # A buffer may be a part of another one, which safetensors refuses.
        name: (tensor if isinstance(tensor, nn.Parameter) else tensor.clone()).detach().contiguous()
        for name, tensor in _tensors(module).items()
    }
    digests = {name: _digest(text.encode()) for name, text in texts.items()}
    digests[INPUT_TENSORS] = _digest(given)
    # One entry: safetensors writes several in any order.
    metadata = {"npas_fx": json.dumps(digests)}
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StorageError(f"{target} cannot be made a folder: {err}") from err
    # The weights name the other files by their digests: a mixture of two saves is noticed.
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda path: save_file(tensors, path, metadata=metadata),
        INPUT_TENSORS: lambda path: path.write_bytes(given),
    }
    for name, text in texts.items():
        writers[name] = partial(Path.write_text, data=text, encoding="utf-8")
    _write_all(target, writers)
    for argument in inputs.structure:
        if why := inputs.why_not_held(argument):
            warnings.warn(
                f"{target} cannot hold {why}; pass {argument} to npas_fx.load again",
                StorageWarning,
                stacklevel=3,
            )


def _write_all(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write all files under temporary names, then rename them; on failure none has changed."""
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError) as err:
        raise StorageError(f"{folder} cannot be written: {err}") from err
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def read_plan(folder: str | os.PathLike[str]) -> Plan:
    """Read the plan of a folder.

    Raises:
        StorageError: a file is missing, or the files are not of one save.
    """
    source = Path(folder)
    contents = {name: _read_text(source / name).encode() for name in (PLAN, CAPTURE)}
    digests = _read_digests(source)
    if INPUTS in digests:  # not of an early version
        contents[INPUTS] = _read_text(source / INPUTS).encode()
        contents[INPUT_TENSORS] = _read_bytes(source / INPUT_TENSORS)
    for name, content in contents.items():
        if digests.get(name) != _digest(content):
            raise StorageError(
                f"{source / name} is not the one that {WEIGHTS} was saved with (it was edited, or "
                "saving was interrupted); restore it, or apply the plan to a model instead"
            )
    try:
        return Plan.from_json(contents[PLAN].decode())
    except PlanError as err:
        raise StorageError(f"{source / PLAN}: {err}") from err


def read_options(folder: str | os.PathLike[str]) -> EmitOptions:
    """Read how the module in a folder was emitted."""
    saved = json.loads(_read_text(Path(folder) / CAPTURE)).get("options", {})
    return EmitOptions(**{**saved, "calls": tuple(saved.get("calls", ()))})


def read_inputs(
    folder: str | os.PathLike[str], passed: Mapping[str, Any], device: torch.device | str
) -> dict[str, Any]:
    """Read the example inputs of a folder, but for those that are passed.

    Args:
        folder: one that ``read_plan`` has checked.
        passed: name -> value of the arguments of ``npas_fx.load``; None is not passed, but that
            ``example_inputs`` and ``example_kwargs`` are one example.
        device: of the model.

    Raises:
        StorageError: the folder does not hold what is not passed, or it is damaged.
    """
    source = Path(folder)
    given = {name for name, value in passed.items() if value is not None}
    if given.intersection(_EXAMPLE):
        given.update(_EXAMPLE)
    if INPUTS not in _read_digests(source):  # of an early version
        return {**passed, "more_examples": passed["more_examples"] or ()}
    inputs = dict(passed)
    try:
        held = HeldInputs(
            structure=json.loads(_read_text(source / INPUTS)),
            tensors=load(_read_bytes(source / INPUT_TENSORS)),
        )
        for name in (name for name in passed if name not in given):
            if why := held.why_not_held(name):
                raise StorageError(f"{source} does not hold {why}; pass {name} to npas_fx.load")
            inputs[name] = held.read(name, device)
    except StorageError:
        raise
    except Exception as err:  # of any kind, if the data are none of ours
        raise StorageError(f"{source / INPUTS} is damaged: {err!r}") from err
    return inputs


def check_report(folder: str | os.PathLike[str], capture: Capture) -> None:
    """Refuse a model that is captured differently from the one that was saved.

    Raises:
        StorageError: with the first differences.
    """
    saved = json.loads(_read_text(Path(folder) / CAPTURE))
    saved.pop("options", None)
    found = json.loads(json.dumps(capture.report()))
    differences = []
    for section in saved.keys() | found.keys():
        before, now = saved.get(section, {}), found.get(section, {})
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                differences.append(
                    f"{section} {key}: {before.get(key)!r} saved, {now.get(key)!r} now"
                )
    if differences:
        raise StorageError(
            f"the model is not the one saved in {folder}: {'; '.join(sorted(differences)[:3])}; "
            "pass an instance of the same architecture, and the example inputs of the transform "
            "(build it under torch.device('meta') rather than move it there, which unties weights; "
            "or off it, where the model's code asks buffers for their values)"
        )


def refuse_meta_constants(model: nn.Module) -> None:
    """Refuse a tensor on the meta device that is neither parameter nor buffer: none is saved.

    Raises:
        StorageError: with its name.
    """
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta and id(value) not in known:
                raise StorageError(
                    f"{f'{path}.{name}' if path else name} is a plain tensor attribute without a "
                    "value (the model is on the meta device), and no folder holds it; register it "
                    "as a buffer, or pass an architecture that is not on the meta device"
                )


def fill_tensors(module: EmittedModule, folder: str | os.PathLike[str]) -> None:
    """Put the saved tensors into a module of the same plan, with the dtypes that they have.

    Raises:
        StorageError: names or shapes differ; the module is then in an undefined state.
    """
    path = Path(folder) / WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as err:
        raise StorageError(f"{path} cannot be read: {err}") from err
    _fit_buffers(module, saved)
    wanted = _tensors(module)
    if saved.keys() != wanted.keys():
        differing = sorted(saved.keys() ^ wanted.keys())
        raise StorageError(f"{path} and the module differ in the tensors {differing[:3]}")
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape:
            shapes = f"{list(saved[name].shape)}, not {list(tensor.shape)}"
            raise StorageError(f"{path}: {name} has the shape {shapes}")
        with torch.no_grad():
            if tensor.dtype != saved[name].dtype:
                tensor.data = tensor.data.to(saved[name].dtype)
            tensor.copy_(saved[name])
    for part in module.modules():
        if isinstance(part, Bank):
            part.note_offset()


def _fit_buffers(module: EmittedModule, saved: Mapping[str, Tensor]) -> None:
    """Make room for the buffers that calls have bound to tensors of other shapes.

    Those that are persistent keep their shapes, and another one is refused, as by load_state_dict.
    """
    skeleton = emission_of(module).capture.skeleton
    names = names_set_by_calls(skeleton)
    for path, _ in skeleton.named_modules():
        part = module.get_submodule(path)
        for name in names & part._non_persistent_buffers_set:
            value = saved.get(f"{path}.{name}" if path else name)
            own = part._buffers[name]
            if value is not None and (own is None or own.shape != value.shape):
                device = device_of(module) if own is None else own.device
                part._buffers[name] = torch.empty_like(value, device=device)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, buffers that are not persistent included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_text(path: Path) -> str:
    return _read_bytes(path).decode().replace("\r\n", "\n")  # as Windows writes it


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise StorageError(
            f"{path} cannot be read: {err}; is it a folder of npas_fx.save?"
        ) from err


def _read_digests(folder: Path) -> dict[str, str]:
    """Name of each other file -> its digest when the weights were written."""
    digests: dict[str, str] = json.loads(_read_metadata(folder / WEIGHTS).get("npas_fx", "{}"))
    return digests


def _read_metadata(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as err:
        raise StorageError(
            f"{path} cannot be read: {err}; is it a folder of npas_fx.save?"
        ) from err
