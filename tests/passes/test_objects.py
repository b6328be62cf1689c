"""Models that return objects of their own classes, such as key-value caches."""

import copy
import enum
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from npas_fx.passes.objects import RemakeObject, is_plain_object
from two_layers import net, x


class Kind(enum.Enum):
    ONE = 1


class Entry:
    def __init__(self, value):
        self.value = value
        self.kind, self.maker, self.number = Kind.ONE, dict, 3


class Cache:
    def __init__(self, size):
        self.size, self.entries = size, []

    def update(self, value):
        self.entries.append(Entry(value))
        return torch.cat([entry.value for entry in self.entries])


def fill(self, value):
    cache = Cache(np.int64(2))
    y = self.a(value)
    cache.update(y)
    return {"output": self.b(cache.update(y + 1)), "cache": cache, "again": cache}


def test_an_object_is_made_anew_with_its_class_and_attributes(check):
    emitted = check(net(fill), x())
    assert not capture(net(fill), x()).leaves
    first, second = emitted(x()), emitted(x())
    assert first["cache"] is first["again"]
    assert first["cache"] is not second["cache"]
    assert isinstance(first["cache"], Cache)
    entry = first["cache"].entries[1]
    assert (type(entry), entry.kind, entry.maker, entry.number) == (Entry, Kind.ONE, dict, 3)
    assert entry.value.requires_grad
    assert first["cache"].size == 2
    assert first["cache"].update(entry.value).shape[0] == 9
    assert len(second["cache"].entries) == 2


def test_an_object_goes_through_a_copy_and_through_saving(tmp_path):
    model = net(fill)
    emitted = npas_fx.transform(model, 0.7, example_inputs=x())
    npas_fx.save(emitted, tmp_path)
    loaded = npas_fx.load(tmp_path, model, example_inputs=x())
    value = x()
    for other in (loaded, copy.deepcopy(emitted), npas_fx.materialize(emitted)):
        got = other(value)["cache"].entries[0].value
        torch.testing.assert_close(got, emitted(value)["cache"].entries[0].value)


def test_an_object_that_contains_itself_or_has_slots_makes_a_call(falls_back):
    def cycle(self, value):
        cache = Cache(1)
        cache.entries.append(cache)
        return self.b(self.a(value)), cache

    class Slots:
        __slots__ = ("value",)

    def slots(self, value):
        made = Slots()
        made.value = self.b(self.a(value))
        return made

    model = net(cycle)
    assert "contains itself" in capture(model, x()).leaves[""]
    assert npas_fx.transform(model, 1.0, example_inputs=x(), verify=False)(x())[1].size == 1
    assert "Slots" in capture(net(slots), x()).leaves[""]


def test_an_object_handed_to_a_call_makes_a_bigger_call(check):
    class Appends(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, value, cache):
            value = self.fc(value)
            if value.sum() > 1e9:
                return value
            cache.update(value)
            return value + 1

    def forward(self, value):
        cache = Cache(1)
        return self.appends(self.b(self.a(value)), cache), len(cache.entries)

    model = net(forward)
    model.appends = Appends()
    assert capture(model, x()).leaves.keys() == {""}
    assert check(model, x())(x())[1] == 1


@dataclass
class Data:
    value: int


@pytest.mark.parametrize(
    ("value", "is_plain"),
    [
        (Cache(1), True),
        (Data(1), True),
        (Kind.ONE, False),
        (Cache, False),
        (torch.ones(1), False),
        (nn.Linear(1, 1), False),
        (torch.float32, False),
        ({}, False),
        (np.float64(1), False),
        (len, False),
    ],
    ids=[
        "object",
        "dataclass",
        "enum",
        "class",
        "tensor",
        "module",
        "dtype",
        "dict",
        "number",
        "builtin",
    ],
)
def test_plain_objects(value, is_plain):
    assert is_plain_object(value) is is_plain


def test_makers_of_the_same_are_equal():
    one, same = (RemakeObject(Cache, ["a", "size"], {"size": 1}) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != RemakeObject(Cache, ["a", "size"], {"size": 2})
    assert one != RemakeObject(Cache, ["size", "a"], {"size": 1})
    assert one != RemakeObject(Entry, ["a", "size"], {"size": 1})
    assert one != Cache
