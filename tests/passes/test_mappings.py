"""Dicts and objects among the inputs: what the code asks of them is checked at each call."""

import copy
from collections import OrderedDict, UserDict
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import npas_fx
from comparison import emit
from npas_fx.passes.trace_mode import _lines


def x(rows=3):
    return torch.randn(rows, 4)


def batch(rows=3):
    return {"a": x(rows), "b": x(rows)}


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
        self.__class__ = type("Net", (Net,), {"forward": forward})


def opaque(model, *args):
    return [each.reason for each in npas_fx.inspect(model, example_inputs=args).opaque]


def items(self, batch):
    return sum(self.parts[name](value) for name, value in batch.items())


def values(self, batch):
    return self.fc(torch.cat(list(batch.values())))


def keys(self, batch):
    return sum(self.parts[name](batch[name]) for name in batch.keys())  # noqa: SIM118


def iterates(self, batch):
    return [self.parts[name](batch[name]) for name in batch]


def backwards(self, batch):
    return [self.parts[name](batch[name]) for name in reversed(batch)]


def unpacks(self, batch):
    first, second = batch
    return self.parts[first](batch[first]) - self.parts[second](batch[second])


def sorts(self, batch):
    return [self.parts[name](batch[name]) for name in sorted(batch)]


def copies(self, batch):
    copied = dict(batch)
    copied["c"] = self.fc(copied["a"])
    return {**copied, "again": self.parts["c"](copied["b"])}


def first_of_values(self, batch):
    return self.fc(next(iter(batch.values()))) * len(batch) * len(batch.items())


def add(a, b):
    return a + b


def by_name(self, batch):
    return self.fc(add(**batch))


def of_sets(self, batch):
    names = sorted({"a", "b", "c"} & batch.keys())
    return self.fc(batch["a"]) if {"a", "b"} <= batch.keys() else names


def updates_own(self, batch):
    made = {}
    made.update(batch)
    return {name: self.parts[name](value) for name, value in made.items() if name != "b"}


OF_ALL = (
    *(items, values, keys, iterates, backwards, unpacks, sorts, copies, first_of_values, by_name),
    updates_own,
)


@pytest.mark.parametrize("forward", OF_ALL)
def test_what_is_made_of_all_keys_is_traced(forward, check):
    assert opaque(Net(forward), batch()) == []
    check(Net(forward), batch(), others=[(batch(5),)])


@pytest.mark.parametrize("forward", OF_ALL)
@pytest.mark.parametrize("names", ["abc", "ba", "a", "ac"])
def test_other_keys_are_refused_by_name_and_the_model_can_take_over(forward, names):
    model = Net(forward)
    other = {name: x() for name in names}
    shared = emit(model, 1.0, (batch(),))
    with pytest.raises(npas_fx.GuardError) as caught:
        shared(other)
    words = f"the keys of batch = ('a', 'b'), called with {tuple(names)}"
    assert words in str(caught.value)
    falls_back = emit(model, 1.0, (batch(),), on_guard="fallback")
    plain = npas_fx.materialize(falls_back)
    try:
        expected = plain(other)
    except (KeyError, TypeError, ValueError) as err:
        with pytest.raises(type(err)):
            falls_back(other)
    else:
        torch.testing.assert_close(falls_back(other), expected)


def test_examples_of_other_keys_make_a_call():
    model = Net(items)
    other = {"c": x()}
    shared = npas_fx.transform(model, 1.0, example_inputs=(batch(),), more_examples=[(other,)])
    assert torch.equal(shared(other), model(other))
    (why,) = (
        npas_fx.inspect(model, example_inputs=(batch(),), more_examples=[(other,)])
        .opaque[0]
        .reason,
    )
    assert "keys of batch, which differ" in why


def by_key(self, batch):
    return self.fc(batch["a"])


def asks_for_mask(self, batch):
    y = self.fc(batch["a"])
    return y * batch["mask"] if "mask" in batch else y


def asks_keys_for_mask(self, batch):
    y = self.fc(batch["a"])
    return y if "mask" not in batch.keys() else y * batch["mask"]  # noqa: SIM118


def test_a_key_that_is_read_leaves_the_others_free():
    model = Net(by_key)
    shared = emit(model, 1.0, (batch(),))
    other = {"z": None, "a": x()}
    assert torch.equal(shared(other), npas_fx.materialize(shared)(other))


@pytest.mark.parametrize("forward", [asks_for_mask, asks_keys_for_mask])
def test_membership_is_guarded_for_that_key_alone(forward, check):
    model = Net(forward)
    assert opaque(model, batch()) == []
    with_mask = {**batch(), "mask": x()}
    check(model, with_mask)
    shared = check(model, batch(), others=[({"a": x()},), ({"c": x(), "a": x()},)])
    with pytest.raises(npas_fx.GuardError, match=r"\('mask' in batch\) = False, called with True"):
        shared(with_mask)


def both_modes(self, batch):
    return self.fc(batch["a"]) * (2 if ("m" if self.training else "n") in batch else 1)


def test_graphs_that_ask_for_different_keys_are_different():
    model = Net(both_modes)
    for name, is_asked in (("m", True), ("n", False)):
        shared = emit(model, 1.0, (batch(),))
        with pytest.raises(npas_fx.GuardError, match=f"'{name}' in batch"):
            shared.train(is_asked)({**batch(), name: x()})
        shared.train(not is_asked)({**batch(), name: x()})


def test_lines_that_tell_graphs_apart_have_the_key():
    guard = npas_fx.passes.guards.check_guard
    graphs = []
    for key in ("a", "b"):
        graph = torch.fx.Graph()
        args = (graph.placeholder("x"), "has key", True, "words", "line", key)
        graph.call_function(guard, args)
        graphs.append(_lines(graph))
    assert graphs[0] != graphs[1]


def test_operations_of_sets_ask_for_the_keys_in_them(check):
    assert opaque(Net(of_sets), batch()) == []
    shared = check(Net(of_sets), batch(), others=[(batch(5),)])
    with pytest.raises(
        npas_fx.GuardError, match=r"'b' in batch.* called with False at .*test_mapp"
    ):
        shared({"a": x()})


def towers(self, batch):
    return [self.parts[n](v) for tower in batch.values() for n, v in tower.items()]


def of_kinds(self, batch):
    made = []
    for name, value in batch.items():
        if isinstance(value, dict):
            made += [self.parts[key](each) for key, each in value.items()]
        else:
            made.append(self.parts[name](value))
    return torch.stack(made)


def test_dicts_of_dicts(check):
    nested = {"user": {"a": x(), "b": x()}, "item": {"c": x()}}
    assert opaque(Net(towers), nested) == []
    other = {"user": {"a": x(5), "b": x(5)}, "item": {"c": x(5)}}
    shared = check(Net(towers), nested, others=[(other,)])
    with pytest.raises(npas_fx.GuardError, match=r"keys of batch\['item'\] = \('c',\)"):
        shared({**nested, "item": {"c": x(), "a": x()}})
    with pytest.raises(npas_fx.GuardError, match=r"keys of batch\['item'\].*with 'list'"):
        shared({**nested, "item": [x()]})
    check(Net(of_kinds), {"a": x(), "nested": {"b": x(), "c": x()}})


class Own(dict):
    pass


@pytest.mark.parametrize("kind", [OrderedDict, UserDict, Own])
def test_mappings_of_other_classes(kind):
    model, value = Net(items), kind(batch())
    shared = emit(model, 1.0, (value,))
    assert opaque(model, value) == []
    other = kind(batch(5))
    assert torch.equal(shared(other), npas_fx.materialize(shared)(other))
    with pytest.raises(npas_fx.GuardError, match="keys of batch"):
        shared(kind(a=x()))


def test_keys_may_be_numbers(check):
    def forward(self, batch):
        first, second = batch
        return sum(self.fc(value) * key for key, value in batch.items()) + first - second

    check(Net(forward), {3: x(), 0: x()})
    assert opaque(Net(forward), {3: x(), 0: x()}) == []


def adds_and_loops(self, batch):
    batch["c"] = self.fc(batch["a"])
    return sum(self.parts[name](value) for name, value in batch.items())


def pops_and_loops(self, batch):
    had = "b" in batch
    labels = batch.pop("b")
    assert had
    assert "b" not in batch
    return sum(self.parts[name](value) for name, value in batch.items()) - labels


def pops_some(self, batch):
    before = "c" in batch
    batch.pop("c", None)
    return self.fc(batch["a"]) * (1 if before else 2) * (3 if "c" in batch else 4)


def writes_while_it_loops(self, batch):
    for name in batch:
        batch[name] = self.parts[name](batch["a"])
    return batch


def changes_nested(self, batch):
    inner = batch["inner"]
    inner["c"] = self.fc(inner["a"])
    return [self.parts[name](value) for name, value in batch["inner"].items()]


class Pops(nn.Module):
    def forward(self, batch):
        return batch.pop("b")


def called_module_pops(self, batch):
    made = self.pops(batch)
    return made + sum(self.parts[name](value) for name, value in batch.items())


CHANGES = (adds_and_loops, pops_and_loops, pops_some, writes_while_it_loops, changes_nested)


@pytest.mark.parametrize("forward", [*CHANGES, called_module_pops])
@pytest.mark.parametrize("training", [True, False])
def test_changes_of_a_dict_that_is_given_are_those_of_the_model(forward, training):
    model = Net(forward)
    model.pops = Pops()
    value = {**batch(), "c": x()} if forward is pops_some else batch()
    value = {"inner": value} if forward is changes_nested else value
    shared = npas_fx.transform(
        model, 1.0, example_inputs=(copy.deepcopy(value),), solver="greedy"
    ).train(training)
    plain = npas_fx.materialize(shared)
    mine, theirs = copy.deepcopy(value), copy.deepcopy(value)
    torch.testing.assert_close(shared(mine), plain(theirs))
    torch.testing.assert_close(mine, theirs)
    assert list(mine) == list(theirs)
    assert opaque(model, value) == []


@dataclass
class Batch:
    a: Any
    b: Any


class Named(NamedTuple):
    a: Any
    b: Any


def attributes(self, batch):
    y = self.fc(batch.a) + batch.b
    return y if getattr(batch, "extra", None) is None else y * batch.extra


def all_fields(self, batch):
    return [self.parts[field.name](getattr(batch, field.name)) for field in fields(batch)]


def if_it_has(self, batch):
    return self.fc(batch.a) * (batch.extra if hasattr(batch, "extra") else 2)


OBJECTS = [
    *((kind, attributes) for kind in (Batch, Named, SimpleNamespace)),
    (Batch, all_fields),
    *((kind, if_it_has) for kind in (Batch, Named, SimpleNamespace)),
]


@pytest.mark.parametrize(("kind", "forward"), OBJECTS)
def test_attributes_of_objects_are_read(kind, forward):
    model = Net(forward)
    shared = emit(model, 1.0, (kind(**batch()),))
    plain = npas_fx.materialize(shared)
    assert opaque(model, kind(**batch())) == []
    for rows in (3, 5):
        value = kind(**batch(rows))
        torch.testing.assert_close(shared(value), plain(value), rtol=0, atol=0)


@pytest.mark.parametrize("forward", [attributes, if_it_has])
@pytest.mark.parametrize("kind", [Batch, SimpleNamespace])
def test_an_attribute_that_an_object_alone_has_is_guarded(kind, forward):
    def make(*names):
        made = kind(**batch())
        for name in names:
            setattr(made, name, x())
        return made

    for example, other in ((make(), make("extra")), (make("extra"), make())):
        shared = emit(Net(forward), 1.0, (example,))
        with pytest.raises(npas_fx.GuardError, match=r"hasattr\(batch, 'extra'\)"):
            shared(other)


def by_rows(self, batch):
    value = batch.a if isinstance(batch, (Batch, SimpleNamespace)) else batch["a"]
    return self.fc(value) if value.shape[0] > 3 else self.fc(value) * 2


def test_all_that_an_object_has_is_not_seen():
    def forward(self, batch):
        return self.fc(batch.a) if "b" in vars(batch) else batch.b

    shared = emit(Net(forward), 1.0, (Batch(**batch()),))
    value = Batch(**batch())
    assert torch.equal(shared(value), npas_fx.materialize(shared)(value))
    assert "vars() of a traced value" in opaque(Net(forward), value)[0]


@pytest.mark.parametrize("kind", [Batch, SimpleNamespace, Own, UserDict])
def test_rows_in_objects_are_those_of_a_batch(kind):
    model = Net(by_rows)
    value = kind(**batch())
    assert "branches on a value" in opaque(model, value)[0]
    shared = emit(model, 1.0, (value,))
    plain = npas_fx.materialize(shared)
    for rows in (3, 5):
        other = kind(**batch(rows))
        assert torch.equal(shared(other), plain(other))


def test_lists_of_feature_maps(check):
    def forward(self, maps):
        top = 0
        made = []
        for part, each in zip(self.parts.values(), reversed(maps), strict=False):
            top = part(each) + top
            made.append(top)
        return made, len(maps), [self.fc(each) for each in maps[1:]]

    assert opaque(Net(forward), [x(), x()]) == []
    check(Net(forward), [x(), x()], others=[([x(5), x(5)],)])
    check(Net(forward), (x(), x()))


@pytest.mark.parametrize("forward", [items, asks_for_mask, copies])
def test_compiling_breaks_no_graph(forward):
    shared = emit(Net(forward), 1.0, (batch(),)).eval()
    value = batch()
    compiled = torch.compile(copy.deepcopy(shared), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), shared(value))


def test_without_an_example_it_is_a_call(check):
    model = Net(items)
    assert npas_fx.inspect(model).opaque
    check(model, batch(), example=False)
