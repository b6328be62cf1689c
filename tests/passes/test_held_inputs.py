"""Example inputs as plain data: what is read again is what was written."""

import json
import math
import re
from collections import OrderedDict, namedtuple
from enum import IntEnum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from npas_fx.passes.held_inputs import HeldInputs, hold_inputs

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
]


@st.composite
def tensors(draw):
    """Tensors of all dtypes, some without dimensions or elements, some not contiguous."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.arange(math.prod(shape)).view(shape).to(draw(st.sampled_from(DTYPES)))
    values = values.mT if len(shape) > 1 and draw(st.booleans()) else values
    is_trainable = values.dtype.is_floating_point and draw(st.booleans())
    return values.requires_grad_(is_trainable)


keys = st.one_of(st.text('a"\\\n\ud800é', max_size=4), st.integers(), st.booleans(), st.none())
constants = st.one_of(
    keys,
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=4),
    st.sampled_from(
        [torch.float32, torch.device("cpu"), torch.device("cuda:1"), torch.Size([2, 3])]
    ),
)
inner = st.recursive(
    st.one_of(constants, tensors()),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.lists(inside, max_size=3).map(tuple),
        st.dictionaries(st.one_of(keys, st.tuples(keys, keys)), inside, max_size=3),
    ),
    max_leaves=6,
)
values = st.lists(inner, min_size=2, max_size=5)


def through_a_folder(held):
    return HeldInputs(
        structure=json.loads(json.dumps(held.structure, allow_nan=False)),
        tensors=load(save(held.tensors)),
    )


def held_again(value):
    held = hold_inputs({"it": value}, "cpu")
    assert held.why_not_held("it") == ""
    return through_a_folder(held).read("it", "cpu")


def same(one, two):
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        kinds = [(each.dtype, each.shape, each.requires_grad) for each in (one, two)]
        return kinds[0] == kinds[1] and torch.equal(one.double(), two.double())
    if isinstance(one, dict):
        return same(list(one.items()), list(two.items()))
    if type(one) in (list, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return repr(one) == repr(two)  # nan too, and the sign of zero


@given(values)
def test_what_is_held_is_what_was_given_and_the_data_are_the_same_again(value):
    again = held_again(value)
    assert same(again, value)
    one, two = (hold_inputs({"it": each}, "cpu") for each in (value, again))
    assert json.dumps(one.structure) == json.dumps(two.structure)
    assert save(one.tensors) == save(two.tensors)


def test_the_copies_share_no_memory():
    x = torch.zeros(3, requires_grad=True)
    held = hold_inputs({"it": x}, "cpu")
    with torch.no_grad():
        x.add_(1)
        held.read("it", "cpu").add_(1)
    assert held.read("it", "cpu").tolist() == [0, 0, 0]
    assert not held.tensors["it.0"].requires_grad


def test_what_is_given_twice_is_one_tensor():
    x = torch.zeros(3)
    held = hold_inputs({"it": (x, {"again": x})}, "cpu")
    assert list(held.tensors) == ["it.0"]
    one, two = held.read("it", "cpu")
    assert two["again"] is one


def test_views_are_copied_as_they_are_seen():
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(held_again(x.T), x.T)
    assert torch.equal(held_again(x[:, :1].expand(2, 4)), x[:, :1].expand(2, 4))
    z = torch.tensor([1 + 2j], dtype=torch.complex64)
    assert held_again(z.conj()).tolist() == [1 - 2j]
    assert held_again(z.conj().imag).tolist() == [-2]


class Kind(IntEnum):
    ONE = 1


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), r"it \(a object\)"),
        ((1, [{"x": {1}}]), r"it\[1\]\[0\]\['x'\] \(a set\)"),
        (Pair(1, 2), r"it \(a Pair\)"),
        (OrderedDict(a=1), r"it \(a OrderedDict\)"),
        (Kind.ONE, r"it \(a Kind\)"),
        (torch.nn.Parameter(torch.zeros(2)), r"it \(a Parameter\)"),
        (torch.zeros(2, device="meta"), r"it \(a torch.float32 tensor, torch.strided on meta\)"),
        (torch.eye(2).to_sparse(), r"it \(a torch.float32 tensor, torch.sparse_coo on cpu\)"),
        (torch.zeros(2, dtype=torch.complex128), r"it \(a torch.complex128 tensor, .* on cpu\)"),
    ],
    ids=[
        "object",
        "set",
        "named_tuple",
        "subclass",
        "enum",
        "parameter",
        "meta",
        "sparse",
        "dtype",
    ],
)
def test_what_cannot_be_held_is_named(value, why):
    held = hold_inputs({"other": (torch.zeros(1), math.inf), "it": value}, "cpu")
    assert re.fullmatch(why, held.why_not_held("it"))
    assert list(held.tensors) == ["other.0"]
    assert held.why_not_held("other") == ""


def test_tensors_beside_the_model_follow_it():
    """Those elsewhere, such as lengths on the CPU, stay on the CPU."""
    beside, elsewhere = (hold_inputs({"it": torch.zeros(2)}, device) for device in ("cpu", "cuda"))
    assert beside.read("it", "meta").device.type == "meta"
    assert elsewhere.read("it", "meta").device.type == "cpu"
