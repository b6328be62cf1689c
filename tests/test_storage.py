"""Saving and loading: bit for bit, without pickle, and whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import npas_fx
from models import MODELS
from npas_fx import StorageError, StorageWarning, plan_of, storage, transform
from oracle import same_tensors, seeded
from strategies import NetworkSpec, PartSpec

INPUTS = {"inputs.json", "inputs.safetensors"}
FILES = {"plan.json", "capture.json", "weights.safetensors", *INPUTS}


def emit(budget: float = 0.4, name: str = "mlp") -> nn.Module:
    example = MODELS[name]
    return transform(example.make(), budget, example_inputs=example.inputs(3))


def load(folder: Path, name: str = "mlp") -> nn.Module:
    return npas_fx.load(folder, MODELS[name].make(seed=4))


@pytest.fixture
def saved(tmp_path):
    npas_fx.save(emit(), tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_holds_five_files(saved):
    assert set(contents(saved)) == FILES
    assert npas_fx.Plan.from_json((saved / "plan.json").read_text()) == plan_of(emit())
    json.loads((saved / "capture.json").read_text())


def test_folders_in_between_are_made(tmp_path):
    npas_fx.save(emit(), str(tmp_path / "a" / "b" / "c"))
    assert same_tensors(load(tmp_path / "a" / "b" / "c"), emit())


def test_saving_again_replaces_and_leaves_other_files_alone(saved):
    (saved / "notes.txt").write_text("mine")
    npas_fx.save(emit(0.7), saved)
    assert set(contents(saved)) == {*FILES, "notes.txt"}
    assert plan_of(load(saved)) == plan_of(emit(0.7))


@pytest.mark.parametrize("source", ["transformed", "loaded"])
def test_saving_the_same_gives_the_same(saved, tmp_path, source):
    npas_fx.save(emit() if source == "transformed" else load(saved), tmp_path / "again")
    one, two = contents(saved), contents(tmp_path / "again")
    assert one == two
    assert same_tensors(load(saved), load(tmp_path / "again"))


def test_buffers_are_saved_also_those_that_are_not_persistent(tmp_path):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("scale", torch.ones(4), persistent=False)

        def forward(self, x):
            return self.norm(self.fc(x)) * self.scale

    shared = transform(Counting(), 0.8)
    shared.scale.mul_(3)
    shared(torch.randn(8, 4))
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, Counting())
    assert torch.equal(loaded.scale, torch.full((4,), 3.0))
    assert torch.equal(loaded.norm.running_mean, shared.norm.running_mean)
    assert loaded.norm.num_batches_tracked == 1
    assert same_tensors(loaded, shared)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(StorageError, match=rf"{name} cannot be read"):
        load(saved)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere.*is it a folder of npas_fx\.save"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "digit"), [("plan.json", "1"), ("capture.json", "1"), ("inputs.json", "0")]
)
def test_an_edited_file_is_refused(saved, name, digit):
    text = (saved / name).read_text()
    assert digit in text
    (saved / name).write_text(text.replace(digit, "2", 1))
    with pytest.raises(StorageError, match=rf"{name} is not the one that .* was saved with"):
        load(saved)


def test_a_mixture_of_two_saves_is_refused(saved, tmp_path):
    npas_fx.save(emit(0.7), tmp_path / "other")
    os.replace(tmp_path / "other" / "weights.safetensors", saved / "weights.safetensors")
    with pytest.raises(StorageError, match="saving was interrupted"):
        load(saved)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_refused(saved, share):
    weights = saved / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StorageError, match=r"weights\.safetensors cannot be read"):
        load(saved)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda t: t.pop("stem.bias"), "differ in the tensors"),
        (lambda t: t.update(extra=torch.zeros(1)), "differ in the tensors"),
        (lambda t: t.update({"stem.bias": torch.zeros(3)}), "has the shape"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_other_tensors_are_refused(saved, edit, why):
    weights = saved / "weights.safetensors"
    metadata = storage._read_metadata(weights)
    tensors = load_file(weights)
    edit(tensors)
    save_file(tensors, weights, metadata=dict(metadata))
    with pytest.raises(StorageError, match=why):
        load(saved)


def test_another_architecture_is_refused(saved):
    for name in ("residual_cnn", "recursive"):
        with pytest.raises(StorageError, match="the model is not the one saved in"):
            npas_fx.load(saved, MODELS[name].make(), example_inputs=MODELS[name].inputs(2))
    with pytest.raises(StorageError, match=r"stem\.bias: '\[24\] bias' saved, '\[20\]"):
        npas_fx.load(saved, type(MODELS["mlp"].make())(width=20), example_inputs=torch.zeros(2, 12))


def test_another_call_is_refused(tmp_path):
    npas_fx.save(emit(name="gpt"), tmp_path)
    model, (idx, _) = MODELS["gpt"].make(), MODELS["gpt"].inputs(2)
    with pytest.raises(StorageError, match="example inputs of the transform"):
        npas_fx.load(tmp_path, model, example_inputs=(idx,))


@pytest.mark.parametrize(
    "fails_at", ["weights", "inputs.json", "capture.json", "plan.json", "replace"]
)
def test_an_interrupted_save_leaves_the_old_one(saved, monkeypatch, fails_at):
    before = contents(saved)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if fails_at == "weights":
        monkeypatch.setattr(storage, "save_file", full)
    elif fails_at == "replace":
        monkeypatch.setattr(storage.os, "replace", full)
    else:
        write = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda path, *args, **kw: full() if fails_at in path.name else write(path, *args, **kw),
        )
    with pytest.raises(StorageError, match=r"cannot be written.*No space"):
        npas_fx.save(emit(0.7), saved)
    monkeypatch.undo()
    assert contents(saved) == before
    assert same_tensors(load(saved), emit())


def test_a_save_that_is_killed_half_way_is_noticed(saved, monkeypatch):
    """Between two renames nothing can be undone; then the folder must not load as if whole."""
    replace, calls = os.replace, []

    def once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(storage.os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        npas_fx.save(emit(0.7), saved)
    monkeypatch.undo()
    assert set(contents(saved)) == FILES
    with pytest.raises(StorageError, match="saving was interrupted"):
        load(saved)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot be made a folder"):
        npas_fx.save(emit(), tmp_path / "file" / "model")
    with pytest.raises(StorageError, match="cannot be made a folder"):
        npas_fx.save(emit(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written"):
        npas_fx.save(emit(), tmp_path)


def test_nothing_is_pickled(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle is used")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (pickle, "dump"),
        (pickle, "dumps"),
        (torch, "load"),
        (torch, "save"),
    ):
        monkeypatch.setattr(module, name, refuse)
    loaded = load(saved)
    npas_fx.save(loaded, saved)


def test_pickling_an_emitted_module_says_what_to_do_instead():
    with pytest.raises(TypeError, match=r"npas_fx\.save"):
        pickle.dumps(emit())


def test_bfloat16_round_trip(tmp_path):
    shared = emit().bfloat16()
    npas_fx.save(shared, tmp_path)
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same_tensors(loaded, shared)
    x = MODELS["mlp"].inputs(3)[0].bfloat16()
    assert torch.equal(loaded.eval()(x), shared.eval()(x))


@pytest.mark.parametrize("name", ["mlp", "wrn", "gpt", "lstm"])
def test_loading_into_a_model_on_the_meta_device(tmp_path, name):
    example, shared = MODELS[name], emit(0.6, name)
    npas_fx.save(shared, tmp_path / "one")
    with torch.device("meta"):
        model = example.build()
    loaded = npas_fx.load(tmp_path / "one", model)
    npas_fx.save(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert same_tensors(loaded, shared)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    x = example.inputs(3)
    got, expected = (seeded(lambda m=m: m.eval()(*x)) for m in (loaded, shared))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


class Positions(nn.Module):
    """Has a tensor that is neither parameter nor buffer, so no folder holds it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.places = torch.arange(8.0)

    def forward(self, x):
        return self.fc(x + self.places)


def test_a_plain_tensor_without_a_value_is_refused(tmp_path):
    npas_fx.save(transform(Positions(), 0.9), tmp_path)
    with torch.device("meta"):
        model = Positions()
    with pytest.raises(StorageError, match="places is a plain tensor attribute"):
        npas_fx.load(tmp_path, model)
    model.places = torch.arange(8.0)
    x = torch.randn(2, 8)
    expected = npas_fx.materialize(npas_fx.load(tmp_path, Positions()))(x)
    assert torch.equal(npas_fx.load(tmp_path, model)(x), expected)


def test_loading_takes_the_modes_of_the_model(saved):
    model = MODELS["mlp"].make().eval()
    loaded = npas_fx.load(saved, model, example_inputs=MODELS["mlp"].inputs(2))
    assert not any(part.training for part in loaded.modules())
    assert all(part.training for part in load(saved).modules())


def test_trainability_is_the_models(tmp_path):
    spec = NetworkSpec(
        domain="vector", width=4, parts=(PartSpec("plain"),) * 2, names=("a", "b"), frozen=(1,)
    )
    shared = transform(spec.build(), 0.9)
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, spec.build())
    flags = {name: p.requires_grad for name, p in shared.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    assert not all(flags.values())


class Attends(nn.Module):
    """Has arguments of many kinds, some of which the example leaves out."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mask=None, *, scale=1.0, cache=None, limits=(0, 1)):
        y = self.value(x) + self.query(x) * scale
        y = y if mask is None else y * mask["keep"]
        return y.clamp(*limits), y if cache is None else y + cache.kept


class Cache:
    kept = 2.0


def attends(**kwargs):
    return transform(Attends(), 0.8, example_inputs=torch.randn(2, 8), example_kwargs=kwargs)


KEEP = {"keep": torch.tensor([True, False] * 4)}


def test_a_folder_says_how_the_model_is_called(tmp_path):
    """Without the example the mask would be the constant None, and the scale 1."""
    shared = attends(mask=KEEP, scale=float("inf"), limits=(-1, 2.5))
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, Attends())
    arguments = {"mask": KEEP, "scale": float("inf"), "limits": (-1, 2.5)}
    for one, two in zip(*(m(torch.ones(5, 8), **arguments) for m in (shared, loaded)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(npas_fx.GuardError, match="scale"):
        loaded(torch.ones(5, 8), mask=KEEP)


def test_later_changes_of_the_example_make_no_difference(saved, tmp_path):
    example = MODELS["mlp"]
    inputs = example.inputs(3)
    shared = transform(example.make(), 0.4, example_inputs=inputs)
    inputs[0].zero_()
    npas_fx.save(shared, tmp_path / "again")
    assert contents(saved) == contents(tmp_path / "again")


def test_a_passed_example_wins(tmp_path):
    npas_fx.save(attends(mask=KEEP), tmp_path)
    with pytest.raises(StorageError, match="call arguments"):
        npas_fx.load(tmp_path, Attends(), example_inputs=torch.randn(2, 8))
    x = torch.randn(3, 8)
    loaded = npas_fx.load(tmp_path, Attends(), example_inputs=x, example_kwargs={"mask": KEEP})
    npas_fx.save(loaded, tmp_path)
    assert torch.equal(load_file(tmp_path / "inputs.safetensors")["example_inputs.0"], x)


def test_what_a_folder_cannot_hold_is_passed_again(tmp_path):
    shared = attends(mask=KEEP, cache=Cache())
    why = r"example_kwargs\['cache'\] \(a Cache\); pass example_kwargs to npas_fx\.load"
    with pytest.warns(StorageWarning, match=why):
        npas_fx.save(shared, tmp_path)
    with pytest.raises(StorageError, match=rf"does not hold {why}"):
        npas_fx.load(tmp_path, Attends())
    arguments = {"mask": KEEP, "cache": Cache()}
    x = torch.randn(3, 8)
    loaded = npas_fx.load(tmp_path, Attends(), example_inputs=x, example_kwargs=arguments)
    for one, two in zip(*(m(x, **arguments) for m in (shared, loaded)), strict=True):
        assert torch.equal(one, two)


class Shortens(nn.Module):
    """Goes another way where there are many rows behind each other."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, *, cache=None):
        return self.two(self.one(x[:, :3] if x.shape[1] > 3 else x))


SHORT, LONG = torch.randn(2, 2, 4), torch.randn(2, 5, 4)


def test_a_folder_holds_further_examples(tmp_path):
    shared = transform(Shortens(), 0.8, example_inputs=SHORT, more_examples=[LONG])
    npas_fx.save(shared, tmp_path)
    with torch.device("meta"):
        model = Shortens()
    for passed in ({}, {"example_inputs": SHORT}):
        loaded = npas_fx.load(tmp_path, model, **passed)
        for x in (SHORT, LONG):
            assert torch.equal(loaded(x), shared(x))
    with pytest.raises(StorageError, match=r"leaves : 'Shortens' saved, None now"):
        npas_fx.load(tmp_path, model, more_examples=())


def test_further_examples_that_a_folder_cannot_hold_are_passed_again(tmp_path):
    def examples():
        return [{"x": x, "cache": Cache()} for x in (SHORT, LONG)]

    example, *further = examples()
    shared = transform(Shortens(), 0.8, example_kwargs=example, more_examples=further)
    with pytest.warns(StorageWarning) as caught:
        npas_fx.save(shared, tmp_path)
    assert len(caught) == 2
    why = r"does not hold more_examples\[0\]\['cache'\] \(a Cache\); pass more_examples"
    with pytest.raises(StorageError, match=why):
        npas_fx.load(tmp_path, Shortens(), example_kwargs=example)
    loaded = npas_fx.load(tmp_path, Shortens(), example_kwargs=example, more_examples=further)
    for each in examples():
        assert torch.equal(loaded(**each), shared(**each))


def test_inputs_that_were_cut_short_are_refused(saved):
    path = saved / "inputs.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"inputs\.safetensors is not the one that"):
        load(saved)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "{}",
        "[]",
        '{"example_inputs": {}}',
        '{"example_inputs": {"eval": "1"}}',
        '{"example_inputs": {"dtype": "nn"}}',
        '{"example_inputs": {"device": "nowhere"}}',
        '{"example_inputs": {"bytes": 1}}',
        '{"example_inputs": {"dict": [[[], 1]]}}',
        '{"example_inputs": {"Tensor": {"name": "weights"}}}',
        '{"example_inputs": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "{",
    ],
    ids=[
        *("null", "empty", "list", "no_type", "unknown_type", "no_dtype", "no_device"),
        *("no_text", "no_key", "no_tensor", "deep", "cut"),
    ],
)
def test_inputs_that_no_save_writes_are_refused(saved, text):
    """Also where the digest is right."""
    weights = saved / "weights.safetensors"
    metadata = json.loads(storage._read_metadata(weights)["npas_fx"])
    metadata["inputs.json"] = storage._digest(text.encode())
    save_file(load_file(weights), weights, metadata={"npas_fx": json.dumps(metadata)})
    (saved / "inputs.json").write_text(text)
    with pytest.raises(StorageError, match=r"inputs\.json is damaged"):
        load(saved)


def test_a_folder_without_inputs_still_loads(tmp_path):
    """As earlier versions wrote it; files of that name are not its own then."""
    shared = attends(mask=KEEP)
    npas_fx.save(shared, tmp_path)
    weights = tmp_path / "weights.safetensors"
    metadata = json.loads(storage._read_metadata(weights)["npas_fx"])
    digests = {name: metadata[name] for name in metadata if name not in INPUTS}
    save_file(load_file(weights), weights, metadata={"npas_fx": json.dumps(digests)})
    for name in INPUTS:
        (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match="example inputs of the transform"):
        npas_fx.load(tmp_path, Attends())
    example = {"example_inputs": torch.randn(2, 8), "example_kwargs": {"mask": KEEP}}
    assert same_tensors(npas_fx.load(tmp_path, Attends(), **example), shared)
