"""Storage: an emitted module as a folder of safetensors and JSON, without pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from npas_fx.banks import Bank
from npas_fx.errors import PlanError, StorageError
from npas_fx.ir import Plan
from npas_fx.passes.capture import Capture
from npas_fx.passes.emit import EmitOptions, EmittedModule, emission_of

PLAN, CAPTURE, WEIGHTS = "plan.json", "capture.json", "weights.safetensors"


def write_folder(module: EmittedModule, folder: str | os.PathLike[str]) -> None:
    """Write plan, capture report and all tensors of a module; see ``npas_fx.save``."""
    target = Path(folder)
    emission = emission_of(module)
    plan = emission.plan.to_json()
    captured = {**emission.capture.report(), "options": asdict(emission.options)}
    report = json.dumps(captured, indent=2, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(module).items()}
    # One entry: safetensors writes several in any order.
    metadata = {"npas_fx": json.dumps({PLAN: _digest(plan), CAPTURE: _digest(report)})}
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StorageError(f"{target} cannot be made a folder: {err}") from err
    # The weights name the other two by their digests: a mixture of two saves is noticed.
    _write_all(
        target,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata=metadata),
            CAPTURE: lambda path: path.write_text(report, encoding="utf-8"),
            PLAN: lambda path: path.write_text(plan, encoding="utf-8"),
        },
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
        StorageError: a file is missing, or plan and weights are not of one save.
    """
    source = Path(folder)
    texts = {name: _read_text(source / name) for name in (PLAN, CAPTURE)}
    digests = json.loads(_read_metadata(source / WEIGHTS).get("npas_fx", "{}"))
    for name, text in texts.items():
        if digests.get(name) != _digest(text):
            raise StorageError(
                f"{source / name} is not the one that {WEIGHTS} was saved with (it was edited, or "
                "saving was interrupted); restore it, or apply the plan to a model instead"
            )
    try:
        return Plan.from_json(texts[PLAN])
    except PlanError as err:
        raise StorageError(f"{source / PLAN}: {err}") from err


def read_options(folder: str | os.PathLike[str]) -> EmitOptions:
    """Read how the module in a folder was emitted."""
    return EmitOptions(**json.loads(_read_text(Path(folder) / CAPTURE)).get("options", {}))


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
            "(build it under torch.device('meta') rather than move it there, which unties weights)"
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
    wanted = _tensors(module)
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as err:
        raise StorageError(f"{path} cannot be read: {err}") from err
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


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, buffers that are not persistent included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as err:
        raise StorageError(
            f"{path} cannot be read: {err}; is it a folder of npas_fx.save?"
        ) from err


def _read_metadata(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as err:
        raise StorageError(
            f"{path} cannot be read: {err}; is it a folder of npas_fx.save?"
        ) from err
