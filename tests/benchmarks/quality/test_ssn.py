from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quality.generated import Generated
from quality.ssn import (
    FlatBanks,
    SearchBank,
    cluster,
    count_templates,
    place,
    read_matrix,
    search_matrix,
    shared_names,
    split_budget,
)

torch.set_num_threads(1)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shape_of_a_weight() -> st.SearchStrategy[Shape]:
    return st.builds(
        lambda outputs, inputs, kernel: (outputs, inputs, *kernel),
        st.integers(1, 8),
        st.integers(1, 8),
        st.lists(st.integers(1, 3), max_size=2),
    )


@st.composite
def layers(draw: st.DrawFn, most: int = 7) -> Shapes:
    kinds = draw(st.lists(shape_of_a_weight(), min_size=1, max_size=3))
    drawn = draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=most))
    return {f"blocks.{index}.weight": shape for index, shape in enumerate(drawn)}


@st.composite
def grouped_layers(draw: st.DrawFn) -> tuple[Shapes, list[list[str]]]:
    shapes = draw(layers())
    groups: dict[int, list[str]] = {}
    for name in shapes:
        groups.setdefault(draw(st.integers(0, 2)), []).append(name)
    return shapes, list(groups.values())


def resized(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear, one entry after the other."""

    def corners(index: int, old: int, new: int) -> tuple[int, int, float]:
        position = max(0.0, (index + 0.5) * old / new - 0.5)
        low = min(int(position), old - 1)
        return low, min(low + 1, old - 1), position - low

    made = np.empty((rows, columns))
    for row, column in itertools.product(range(rows), range(columns)):
        top, bottom, down = corners(row, matrix.shape[0], rows)
        left, right, across = corners(column, matrix.shape[1], columns)
        made[row, column] = (1 - down) * (
            (1 - across) * matrix[top, left] + across * matrix[top, right]
        ) + down * ((1 - across) * matrix[bottom, left] + across * matrix[bottom, right])
    return made


@given(grouped_layers(), st.floats(0.02, 12))
def test_the_budget_is_met_from_below_and_no_bank_could_grow(
    network: tuple[Shapes, list[list[str]]], share: float
) -> None:
    shapes, groups = network
    available = round(share * sum(map(math.prod, shapes.values())))
    alone = sum(math.prod(shapes[group[0]]) for group in groups if len(group) == 1)
    try:
        sizes = split_budget(shapes, groups, available)
    except ValueError:
        assert share < 4
        return
    spent = num_parameters(FlatBanks(shapes, groups, sizes, generator())) + alone
    assert spent <= available
    for index, group in enumerate(groups):
        if len(group) == 1:
            assert sizes[index] == 0
            continue
        sizes[index] += 1
        larger = num_parameters(FlatBanks(shapes, groups, sizes, generator())) + alone
        sizes[index] -= 1
        assert larger > available
        if larger == spent + 1:  # no new coefficients
            assert spent == available


@given(layers(most=4), st.integers(1, 1500))
def test_one_bank_is_the_largest_that_the_budget_holds(shapes: Shapes, available: int) -> None:
    def cost(size: int) -> int:
        counts = [min(8, size // math.prod(shape)) for shape in shapes.values()]
        return size + sum(count for count in counts if count >= 2)

    most = max(size for size in range(available + 1) if cost(size) <= available)
    try:
        assert split_budget(shapes, [list(shapes)], available) == [most]
    except ValueError:
        with pytest.raises(ValueError, match="too small"):
            place(shapes, most)


def test_banks_are_proportional_to_the_plain_sizes_of_their_layers() -> None:
    shapes = {"a": (10, 10), "b": (10, 20), "c": (30, 10), "d": (60, 10), "e": (7, 11)}
    groups = [["a", "b"], ["e"], ["d", "c"]]
    # Layers of 100 and 200 mix 4 and 2 templates of a bank of 400; so with 300, 600 and 1200.
    coefficients = (4 + 2) + (4 + 2)
    assert split_budget(shapes, groups, 77 + 400 + 1200 + coefficients) == [400, 0, 1200]
    assert split_budget(shapes, groups, 77 + 60 + 180) == [60, 0, 180]


def test_layers_that_are_all_alone_need_no_bank() -> None:
    shapes = {"a": (2, 3), "b": (4, 5)}
    assert split_budget(shapes, [["a"], ["b"]], 26) == [0, 0]
    banks = FlatBanks(shapes, [["a"], ["b"]], [0, 0], generator())
    assert banks() == {}
    assert num_parameters(banks) == 0
    with pytest.raises(ValueError, match="which have 26"):
        split_budget(shapes, [["a"], ["b"]], 25)


@given(shape_of_a_weight(), st.integers(1, 5000))
def test_templates_are_as_many_as_the_bank_holds_and_at_most_8(shape: Shape, size: int) -> None:
    count = count_templates(shape, size)
    assert 1 <= count <= 8
    assert count == 1 or count * math.prod(shape) <= size
    assert count == 8 or (count + 1) * math.prod(shape) > size


@given(layers(), st.integers(1, 3000))
def test_every_window_lies_in_the_bank(shapes: Shapes, size: int) -> None:
    try:
        windows = place(shapes, size)
    except ValueError:
        with pytest.raises(ValueError, match="too small"):
            [read_matrix(shape, size) for shape in shapes.values()]
        return
    assert set(windows) == set(shapes)
    for name, window in windows.items():
        assert window.num_templates == count_templates(shapes[name], size)
        assert 0 <= window.start <= window.start + window.length <= size
        assert window.start % window.length == 0
        if math.prod(shapes[name]) <= size:
            assert window.length == window.num_templates * math.prod(shapes[name])


@given(shape_of_a_weight(), st.integers(2, 12), st.integers(1, 5000))
def test_layers_of_one_shape_take_successive_windows_and_wrap(
    shape: Shape, num_layers: int, size: int
) -> None:
    rows, columns = 1, 1
    try:
        rows, columns = read_matrix(shape, size)
    except ValueError:
        return
    length = count_templates(shape, size) * rows * columns
    windows = place({str(index): shape for index in range(num_layers)}, size)
    starts = [windows[str(index)].start for index in range(num_layers)]
    assert starts == [index % (size // length) * length for index in range(num_layers)]


def wide_resnet(depth: int, width: int) -> Shapes:
    shapes, inputs = {"stem": (16, 3, 3, 3)}, 16
    for stage, block in itertools.product(range(3), range((depth - 4) // 6)):
        outputs = 16 * width << stage
        shapes[f"{stage}.{block}.conv1"] = (outputs, inputs, 3, 3)
        shapes[f"{stage}.{block}.conv2"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            shapes[f"{stage}.{block}.shortcut"] = (outputs, inputs, 1, 1)
        inputs = outputs
    return shapes | {"classifier": (100, inputs)}


@pytest.mark.parametrize(
    ("depth", "width", "num_plain", "unread_percent"),
    [
        (28, 2, 1_479_220, [0.3, 0.3, 0.3, 0.3, 7.0, 20.3, 4.3, 36.2]),
        (16, 4, 2_772_020, [3.7, 11.3, 14.9, 14.9, 0.7, 14.9, 31.9, 31.9]),
    ],
)
def test_as_much_of_the_bank_is_unread_as_was_measured_in_the_release(
    depth: int, width: int, num_plain: int, unread_percent: list[float]
) -> None:
    shapes = wide_resnet(depth, width)
    for share, expected in zip((0.1, 0.25, 0.5, 1, 1.5, 2, 5, 10), unread_percent, strict=True):
        size = round(share * num_plain)
        unread = np.ones(size, dtype=bool)
        for window in place(shapes, size).values():
            unread[window.start : window.start + window.length] = False
        assert round(100 * unread.mean(), 1) == expected


def test_windows_of_another_length_begin_past_the_first_ones() -> None:
    shapes = {
        "c": (1, 5),  # 8 templates, length 40
        "a0": (1, 3),  # length 24
        "a1": (1, 3),
        "b0": (2, 2),  # length 32
        "a2": (1, 3),
        "d": (3, 1),  # length 24, as the a: one cursor
        "a3": (1, 3),
        "b1": (2, 2),
        "a4": (1, 3),
        "e": (10, 5),  # 2 templates, length 100
    }
    windows = place(shapes, 100)
    starts = {name: window.start for name, window in windows.items()}
    assert list(windows) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "c", "d", "e"]
    assert [starts[f"a{index}"] for index in range(5)] == [0, 24, 48, 72, 0]
    # The offset is 24: ceil(24 / 32) = 1, then 56: ceil(56 / 40) = 2 ends at 120, so from 0.
    assert [starts["b0"], starts["b1"], starts["c"]] == [32, 64, 0]
    assert starts["d"] == 24
    assert starts["e"] == 0


def test_an_offset_past_all_templates_begins_anew() -> None:
    shapes = {"a": (1, 150), "b": (1, 120), "c": (1, 3), "d": (1, 4)}
    windows = place(shapes, 200)  # lengths 150, 120, 24, 32
    # a: the offset is 150 after it. b: ceil(150 / 120) = 2, of one template, so it is 0 again.
    # c: from 0, the offset is 24. d: ceil(24 / 32) = 1.
    assert [windows[name].start for name in "abcd"] == [0, 0, 0, 32]


def test_a_layer_larger_than_the_bank_reads_fewer_rows_and_columns() -> None:
    assert read_matrix((8, 8), 64) == (8, 8)
    assert read_matrix((8, 8), 63) == (7, 7)  # 95 percent of 8 is 8 again, 90 percent 7
    assert read_matrix((8, 8), 40) == (6, 6)
    assert read_matrix((10, 10, 3, 3), 500) == (7, 63)
    assert read_matrix((40, 40), 4) == (2, 2)
    assert read_matrix((3, 3), 1) == (1, 1)
    with pytest.raises(ValueError, match=r"3 entries .* \(40, 40\), which needs at least 4"):
        read_matrix((40, 40), 3)


@given(layers(), st.integers(3, 2000), st.integers(0, 9))
def test_weights_are_those_of_the_formula(shapes: Shapes, size: int, seed: int) -> None:
    try:
        banks = FlatBanks(shapes, [list(shapes)], [size], generator(seed)).double()
    except ValueError:
        return
    flat = banks.banks[0].detach().numpy()
    rows_left = [row.detach().numpy() for row in banks.coefficients()]
    made = banks()
    assert set(made) == set(shapes)
    flops = 0
    for name, shape in shapes.items():
        window = banks.windows[name]
        entries = math.prod(shape)
        if window.num_templates > 1:
            row = rows_left[banks.mixed.index(name)]
            assert len(row) == window.num_templates
            expected = np.zeros(entries)
            for k in range(len(row)):
                begin = window.start + k * entries
                expected += row[k] * flat[begin : begin + entries]
            flops += 2 * len(row) * entries
        elif entries <= size:
            expected = flat[window.start : window.start + entries]
        else:
            part = flat[window.start : window.start + window.rows * window.columns]
            small = part.reshape(window.rows, window.columns)
            expected = resized(small, shape[0], entries // shape[0])
            flops += 8 * entries
        assert made[name].shape == shape
        np.testing.assert_allclose(made[name].detach().numpy().ravel(), expected.ravel(), atol=1e-9)
    assert banks.generation_flops == flops


def test_gradients_reach_what_is_read_and_nothing_else() -> None:
    shapes = {"a": (4, 5), "b": (4, 5), "c": (3, 7), "big": (12, 15)}
    banks = FlatBanks(shapes, [list(shapes)], [100], generator())
    sum(weight.square().sum() for weight in banks().values()).backward()
    read = torch.zeros(100, dtype=torch.bool)
    for window in banks.windows.values():
        read[window.start : window.start + window.length] = True
    grad = banks.banks[0].grad
    assert grad is not None
    assert torch.equal(grad != 0, read)
    assert len(banks.coefficients()) == 3
    for row in banks.coefficients():
        assert row.grad is not None
        assert bool((row.grad != 0).all())


def test_the_most_common_shape_decides_how_the_bank_starts() -> None:
    shapes = {"b": (40, 10), "a0": (10, 40), "a1": (10, 40), "a2": (10, 40)}
    banks = FlatBanks(shapes, [list(shapes)], [9000], generator())
    flat = banks.banks[0].detach()
    assert {window.length for window in banks.windows.values()} == {3200}
    assert banks.windows["b"].start == 3200  # the a begin at 0, 3200 and 0
    assert flat[:6400].std().item() == pytest.approx(math.sqrt(2 / 40), rel=0.05)
    assert flat[6400:].std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    alone = FlatBanks({"b": (40, 10), "c": (40, 10)}, [["b", "c"]], [7000], generator())
    assert alone.banks[0][:6400].std().item() == pytest.approx(math.sqrt(2 / 10), rel=0.05)


def test_coefficients_start_orthogonal_for_each_number_of_templates() -> None:
    shapes = {f"few{index}": (5, 5) for index in range(3)}
    shapes |= {f"many{index}": (20, 5) for index in range(5)}
    banks = FlatBanks(shapes, [list(shapes)], [250], generator())
    row_of = dict(zip(banks.mixed, banks.coefficients(), strict=True))
    few = torch.stack([row_of[f"few{index}"] for index in range(3)])
    many = torch.stack([row_of[f"many{index}"] for index in range(5)])
    assert few.shape == (3, 8)
    assert many.shape == (5, 2)
    torch.testing.assert_close(few @ few.T, torch.eye(3))
    torch.testing.assert_close(many.T @ many, torch.eye(2))


def test_the_seed_decides_the_start() -> None:
    shapes = {"a": (4, 5), "b": (4, 5), "big": (12, 15)}

    def state(seed: int) -> torch.Tensor:
        banks = FlatBanks(shapes, [list(shapes)], [101], generator(seed))
        return nn.utils.parameters_to_vector(banks.parameters())

    torch.manual_seed(1)
    first = state(3)
    torch.manual_seed(2)
    assert torch.equal(first, state(3))
    assert bool((first != state(4)).all())
    assert bool(first.isfinite().all())


def test_a_layer_alone_in_its_group_stays_in_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    groups = [["2.weight", "0.weight"], ["3.weight"]]
    kept = 8 + 8 + 3
    sizes = split_budget(shapes, groups, 120 - kept)
    banks = FlatBanks(shapes, groups, sizes, generator())
    assert shared_names(groups) == ("2.weight", "0.weight")
    network = Generated(model, banks, shared_names(groups))
    assert num_parameters(network) == 120
    assert set(banks()) == {"0.weight", "2.weight"}
    made = banks()
    model.load_state_dict({**model.state_dict(), **made})
    inputs = torch.randn(5, 6)
    torch.testing.assert_close(network(inputs), model(inputs))


@given(layers(), st.integers(4, 700), st.integers(0, 9))
def test_the_search_mixes_quarters_of_the_bank_and_then_resizes(
    shapes: Shapes, size: int, seed: int
) -> None:
    search = SearchBank(shapes, size, generator(seed)).double()
    flat = search.bank.detach().numpy()
    quarter = size // 4
    made = search()
    assert list(made) == list(shapes)
    raw = search.raw_coefficients()
    assert raw.shape == (len(shapes), 4)
    for row, (name, shape) in zip(raw, shapes.items(), strict=True):
        rows, columns = search_matrix(shape, quarter)
        share = np.exp(row) / np.exp(row).sum()
        expected = np.zeros((shape[0], math.prod(shape[1:])))
        for k in range(4):
            part = flat[k * quarter : k * quarter + rows * columns].reshape(rows, columns)
            expected += share[k] * resized(part, *expected.shape)
        assert made[name].shape == shape
        np.testing.assert_allclose(made[name].detach().numpy().ravel(), expected.ravel(), atol=1e-9)


def test_quarters_have_the_proportions_of_the_weight() -> None:
    assert search_matrix((8, 8), 64) == (8, 8)
    assert search_matrix((4, 16), 64) == (4, 16)
    assert search_matrix((16, 4, 1, 1), 70) == (16, 4)  # 70 * 4 = 280, its root 16.7
    assert search_matrix((4, 4, 3, 3), 400) == (6, 66)  # 400 / 9 = 44.4, its root 6.7
    assert search_matrix((1, 1000), 10) == (1, 10)
    assert search_matrix((1000, 1), 10) == (10, 1)


def test_the_search_starts_with_orthogonal_coefficients_and_trains_them_all() -> None:
    shapes = {str(index): (3, 4 + index) for index in range(6)}
    search = SearchBank(shapes, 200, generator())
    raw = search.raw_coefficients()
    np.testing.assert_allclose(raw.T @ raw, np.eye(4), atol=1e-5)
    sum(weight.square().sum() for weight in search().values()).backward()
    assert [each.shape for each in search.coefficients()] == [(6, 4)]
    assert search.bank.grad is not None
    assert search.alpha.grad is not None
    assert bool((search.alpha.grad != 0).all())
    assert np.array_equal(raw, SearchBank(shapes, 200, generator()).raw_coefficients())


@given(st.integers(0, 9), st.permutations([0, 0, 0, 1, 1, 2, 2, 2, 2]))
def test_clusters_that_are_far_apart_are_the_groups(seed: int, truth: list[int]) -> None:
    noise = np.random.default_rng(seed).normal(size=(9, 4))
    names = [f"layer{index}" for index in range(9)]
    groups = cluster(10 * np.eye(4)[truth] + 0.1 * noise, names, 3, seed)
    label_of = dict(zip(names, truth, strict=True))
    assert [len({label_of[name] for name in group}) for group in groups] == [1, 1, 1]
    assert sorted(map(len, groups)) == sorted(Counter(truth).values())
    assert groups[0][0] == "layer0"
    assert [min(group) for group in groups] == sorted(min(group) for group in groups)


@pytest.mark.parametrize("num_groups", [1, 2, 8, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_clustering_is_a_function_of_its_seed(num_groups: int, seed: int) -> None:
    coefficients = np.random.default_rng(seed).normal(size=(40, 4)).astype(np.float32)
    names = [f"{index:02}" for index in range(40)]
    np.random.seed(1)
    groups = cluster(coefficients, names, num_groups, seed)
    np.random.seed(2)
    assert groups == cluster(coefficients, names, num_groups, seed)
    assert len(groups) == num_groups
    assert sorted(name for group in groups for name in group) == names


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_a_searched_network_meets_its_budget_and_trains(num_groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 6),
        nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip
    inputs, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 2
    names = tuple(name for name, p in model.named_parameters() if p.ndim > 1)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    search = SearchBank(shapes, 300, generator())

    def loss_after_training(network: nn.Module) -> tuple[float, float]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
        losses = []
        for _ in range(15):
            loss = nn.functional.cross_entropy(network(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    first, last = loss_after_training(Generated(model, search, names))
    assert last < first
    groups = cluster(search.raw_coefficients(), names, num_groups, 0)
    assert len(groups) == num_groups
    budget = num_parameters(model) // 2 if num_groups == 1 else num_parameters(model)
    kept = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    sizes = split_budget(shapes, groups, budget - kept)
    banks = FlatBanks(shapes, groups, sizes, generator())
    network = Generated(model, banks, shared_names(groups))
    reached = num_parameters(network)
    assert reached <= budget
    assert reached == budget or num_groups == len(names)
    first, last = loss_after_training(network)
    assert last < first


def test_a_bank_too_small_says_for_what() -> None:
    shapes = {"small": (2, 2), "large": (40, 400)}
    with pytest.raises(ValueError, match=r"'large' cannot be made.*at least 40"):
        FlatBanks(shapes, [["small", "large"]], [39], generator())
    with pytest.raises(ValueError, match=r"available=41 .* 'large' cannot be made.*at least 40"):
        split_budget(shapes, [["small", "large"]], 41)
    with pytest.raises(ValueError, match="cannot be cut into 4"):
        SearchBank(shapes, 3, generator())


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        ({"a": (2, 2), "b": (2,)}, [["a", "b"]], r"'b' of shape \(2,\) is not a weight"),
        ({"a": (2, 2), "b": (2, 0)}, [["a", "b"]], r"'b' of shape \(2, 0\) is not a weight"),
        ({"a": (2, 2)}, [["a", "c"]], "name 'c', which has no shape"),
        ({"a": (2, 2)}, [["a"], []], "a group is empty"),
        ({"a": (2, 2), "b": (2, 2)}, [["a", "b"], ["a"]], "'a' is in the groups more than once"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    shapes: Shapes, groups: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split_budget(shapes, groups, 1000)
    with pytest.raises(ValueError, match=message):
        FlatBanks(shapes, groups, [100] * len(groups), generator())


def test_sizes_and_coefficients_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes for 1 groups"):
        FlatBanks({"a": (2, 2), "b": (2, 2)}, [["a", "b"]], [9, 9], generator())
    with pytest.raises(ValueError, match="not a row for each of 2 layers"):
        cluster(np.zeros((3, 4)), ["a", "b"], 1, 0)
    for num_groups in (0, 3):
        with pytest.raises(ValueError, match=f"num_groups={num_groups} is not between 1 and the 2"):
            cluster(np.zeros((2, 4)), ["a", "b"], num_groups, 0)
