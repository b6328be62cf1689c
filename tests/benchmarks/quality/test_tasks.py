from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quality.data import TEXT, DataError, Pictures
from quality.tasks import (
    Characters,
    Cifar,
    Task,
    compute_loss,
    find_recipe,
    iterate_batches,
    read_task,
)
from tiny_tasks import make_characters, make_cifar, make_pictures, make_text, write_data

SHIFTS = range(9)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [each for each in module.modules() if isinstance(each, nn.Conv2d)]


def same_batches(first: Task, second: Task, seeds: tuple[int, int]) -> bool:
    pairs = zip(
        iterate_batches(first, 3, seeds[0]), iterate_batches(second, 3, seeds[1]), strict=True
    )
    return all(torch.equal(one, other) for pair in pairs for one, other in zip(*pair, strict=True))


# Batches


@pytest.mark.parametrize("make", [make_characters, make_cifar])
def test_batches_depend_on_the_seed_alone(make) -> None:
    assert same_batches(make(), make(), (3, 3))
    assert not same_batches(make(), make(), (3, 4))


@pytest.mark.parametrize("make", [make_characters, make_cifar])
def test_there_are_as_many_batches_as_steps(make) -> None:
    batches = list(iterate_batches(make(batch_size=4), 7, 0))
    assert len(batches) == 7
    assert all(len(inputs) == len(wanted) == 4 for inputs, wanted in batches)


@pytest.mark.parametrize("make", [make_characters, make_cifar])
def test_batches_do_not_touch_the_default_generator(make) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    list(iterate_batches(make(), 3, 1))
    assert torch.equal(torch.rand(3), wanted)


def test_characters_are_followed_by_the_wanted_ones() -> None:
    task = make_characters()
    text = "".join(map(chr, task.text.splits["train"].tolist()))
    for inputs, wanted in iterate_batches(task, 5, 0):
        assert inputs.shape == wanted.shape == (4, 8)
        for piece, following in zip(inputs, wanted, strict=True):
            together = [*piece.tolist(), following[-1].item()]
            assert together[1:] == following.tolist()
            assert "".join(map(chr, together)) in text


def test_each_place_of_the_training_text_is_drawn() -> None:
    task = make_characters(text=make_text("abcdefghijk"))  # three pieces of 8 + 1
    first = {int(inputs[row, 0]) for inputs, _ in iterate_batches(task, 30, 0) for row in range(4)}
    last = {int(wanted[row, -1]) for _, wanted in iterate_batches(task, 30, 0) for row in range(4)}
    assert first == {0, 1, 2}
    assert last == {8, 9, 10}


def find_cut(shown: Tensor, original: Tensor) -> tuple[int, int, bool] | None:
    """Shift and mirroring that lead from one ``(3, 32, 32)`` picture to the other."""
    large = torch.zeros(3, 40, 40)
    large[:, 4:36, 4:36] = original
    for down in SHIFTS:
        for right in SHIFTS:
            cut = large[:, down : down + 32, right : right + 32]
            if torch.equal(shown, cut):
                return down, right, False
            if torch.equal(shown, torch.stack([row.flip(-1) for row in cut])):
                return down, right, True
    return None


def test_pictures_are_shifted_and_mirrored_and_keep_their_labels() -> None:
    task = make_cifar(pictures=make_pictures(10), batch_size=5)
    pictures, _ = task.pictures.splits["train"]
    mean, std = (tensor[:, None, None] for tensor in (task.pictures.mean, task.pictures.std))
    cuts = []
    for inputs, labels in iterate_batches(task, 8, 0):
        for shown, label in zip(inputs, labels, strict=True):
            restored = ((shown * std + mean) * 255).round()
            cuts.append(find_cut(restored, pictures[label].float()))
    found = [cut for cut in cuts if cut is not None]
    assert len(found) == len(cuts) == 40
    assert {mirrored for _, _, mirrored in found} == {False, True}
    assert {down for down, _, _ in found} == set(SHIFTS)
    assert {right for _, right, _ in found} == set(SHIFTS)
    assert any(down != right for down, right, _ in found)


def test_each_epoch_shows_each_picture_once_in_a_new_order() -> None:
    task = make_cifar(pictures=make_pictures(10), batch_size=5)
    labels = torch.stack([labels for _, labels in iterate_batches(task, 6, 0)]).view(3, 10)
    assert labels.sort(1).values.tolist() == [list(range(10))] * 3
    assert len({tuple(epoch.tolist()) for epoch in labels}) == 3


def test_training_pictures_stay_as_they_were() -> None:
    task = make_cifar()
    before = task.pictures.splits["train"][0].clone()
    list(iterate_batches(task, 3, 0))
    assert torch.equal(task.pictures.splits["train"][0], before)


# Scores


def score_piece(logits: Tensor, wanted: list[int]) -> tuple[float, int]:
    """Sum of cross entropies and number of hits for logits ``(N, classes)``."""
    loss, hits = 0.0, 0
    for row, right in zip(logits.double().tolist(), wanted, strict=True):
        loss += math.log(sum(map(math.exp, row))) - row[right]
        hits += row.index(max(row)) == right
    return loss, hits


@pytest.mark.parametrize("split", ["valid", "test"])
@torch.no_grad()
def test_score_of_a_text_is_that_of_all_its_pieces(split: str) -> None:
    torch.manual_seed(0)
    task = make_characters(batch_size=2)  # 8 pieces at a time
    module = task.make(8, 2)
    numbers = task.text.splits[split].tolist()
    loss, hits, count = 0.0, 0, 0
    for start in range(0, len(numbers) - 8, 8):
        wanted = numbers[start + 1 : start + 9]
        logits = module(torch.tensor([numbers[start : start + 8]]))[0]
        own_loss, own_hits = score_piece(logits, wanted)
        loss, hits, count = loss + own_loss, hits + own_hits, count + 8
    assert count > 8 * 8, "several batches"
    assert count % (8 * 8), "the last one is smaller"
    found_loss, found_accuracy = task.score(module, split)
    assert found_loss == pytest.approx(loss / count, rel=1e-5)
    assert found_accuracy == hits / count
    assert 0 < hits < count


@pytest.mark.parametrize("split", ["valid", "test"])
@torch.no_grad()
def test_score_of_pictures_is_that_of_all_of_them_as_they_are(split: str) -> None:
    torch.manual_seed(0)
    task = make_cifar(pictures=make_pictures(13), batch_size=2)  # 8 pictures at a time
    module = task.make(4, 8).eval()
    pictures, labels = task.pictures.splits[split]
    loss, hits = 0.0, 0
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        scaled = [
            (channel / 255 - mean) / std
            for channel, mean, std in zip(
                picture, task.pictures.mean, task.pictures.std, strict=True
            )
        ]
        own_loss, own_hits = score_piece(module(torch.stack(scaled)[None]), [label])
        loss, hits = loss + own_loss, hits + own_hits
    found_loss, found_accuracy = task.score(module, split)
    assert found_loss == pytest.approx(loss / 13, rel=1e-4)
    assert found_accuracy == hits / 13


@pytest.mark.parametrize("is_training", [False, True])
def test_scoring_changes_nothing(is_training: bool) -> None:
    task = make_cifar()
    module = task.make(4, 8).train(is_training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert task.score(module, "valid") == task.score(module, "valid")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module.training is is_training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_guess_without_knowledge_costs_the_logarithm_of_the_choices() -> None:
    task = make_cifar()
    module = task.make(4, 8)
    nn.init.zeros_(module.head.weight)
    nn.init.zeros_(module.head.bias)
    (batch,) = iterate_batches(task, 1, 0)
    assert compute_loss(module, batch, task.recipe).item() == pytest.approx(math.log(10))
    assert task.score(module, "test")[0] == pytest.approx(math.log(10))


def test_products_are_in_bfloat16_where_the_recipe_says_so() -> None:
    seen = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output.dtype)

    for autocast in (False, True):
        task = make_characters(autocast=autocast)
        module = task.make(8, 1)
        module.head.register_forward_hook(watch)
        (batch,) = iterate_batches(task, 1, 0)
        assert compute_loss(module, batch, task.recipe).dtype == torch.float32
        task.score(module, "valid")
    assert seen == 2 * [torch.float32] + [torch.bfloat16] * (len(seen) - 2)
    assert len(seen) >= 4


# Plain networks

TASKS = {
    "characters": make_characters(width=8, depth=3),
    "resnet": make_cifar("resnet", width=4, depth=14),
    "wide_resnet": make_cifar("wide_resnet", width=9, depth=16),
}
DEPTHS = {"characters": [1, 2, 3], "resnet": [8, 14], "wide_resnet": [10, 16]}
WIDTHS = {"characters": [2, 4, 6, 8], "resnet": [1, 2, 3, 4], "wide_resnet": [4, 5, 6, 7, 8, 9]}


@pytest.mark.parametrize("name", TASKS)
def test_widths_and_depths_lead_up_to_the_plain_network(name: str) -> None:
    task = TASKS[name]
    assert list(task.widths) == WIDTHS[name]
    assert list(task.depths) == DEPTHS[name]
    assert (task.width, task.depth) == (WIDTHS[name][-1], DEPTHS[name][-1])


@pytest.mark.parametrize("name", TASKS)
def test_networks_of_all_widths_and_depths_can_be_trained(name: str) -> None:
    task = TASKS[name]
    (batch,) = iterate_batches(task, 1, 0)
    for width in task.widths:
        for depth in task.depths:
            module = task.make(width, depth)
            compute_loss(module, batch, task.recipe).backward()
            assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_parameters_fall_with_width_and_depth(name: str) -> None:
    task = TASKS[name]
    sizes = [[count_parameters(task.make(w, d)) for w in task.widths] for d in task.depths]
    lines = sizes + [list(column) for column in zip(*sizes, strict=True)]
    for line in lines:
        assert line == sorted(set(line))


@pytest.mark.parametrize("name", TASKS)
def test_networks_come_from_the_default_generator(name: str) -> None:
    task, made = TASKS[name], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        parameters = task.make(task.widths[-1], task.depths[0]).parameters()
        made.append(torch.cat([parameter.flatten() for parameter in parameters]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_decoder_has_the_shapes_that_width_and_depth_say() -> None:
    task = make_characters()
    shapes = {name: tuple(p.shape) for name, p in task.make(6, 3).named_parameters()}
    tokens = task.text.num_tokens
    assert shapes["tokens.weight"] == shapes["head.weight"] == (tokens, 6)
    for block in range(3):
        for role in ("query", "key", "value", "out"):
            assert shapes[f"blocks.{block}.{role}.weight"] == (6, 6)
        assert shapes[f"blocks.{block}.up.weight"] == (24, 6)
        assert shapes[f"blocks.{block}.down.weight"] == (6, 24)
    assert not any(name.startswith("blocks.3") for name in shapes)


@torch.no_grad()
def test_decoder_does_not_see_what_it_shall_say() -> None:
    torch.manual_seed(0)
    module = make_characters().make(8, 2)
    tokens = torch.arange(8)[None]
    for place in range(8):
        changed = tokens.clone()
        changed[0, place] = 10
        is_same = torch.isclose(module(tokens), module(changed), atol=1e-6).all(-1)[0]
        assert is_same[:place].all()
        assert not is_same[place:].any()


def test_residual_network_has_the_channels_and_layers_that_width_and_depth_say() -> None:
    for width, depth in ((3, 8), (4, 14), (4, 20)):
        layers = convolutions(make_cifar("resnet").make(width, depth))
        assert len(layers) == depth - 1
        channels = [layer.out_channels for layer in layers]
        per_stage = (depth - 2) // 3
        stages = [width * 2**stage for stage in range(3) for _ in range(per_stage)]
        assert channels == [width, *stages]
        assert sum(layer.stride == (2, 2) for layer in layers) == 2


def test_wide_residual_network_has_the_channels_and_layers_that_width_and_depth_say() -> None:
    for width, depth in ((8, 10), (12, 16)):
        module = make_cifar("wide_resnet").make(width, depth)
        layers = [each for each in convolutions(module) if each.kernel_size == (3, 3)]
        assert len(layers) == depth - 3
        per_stage = (depth - 4) // 3
        channels = [layer.out_channels for layer in layers[1:]]
        assert channels == [width // 4 * 2**stage for stage in range(3) for _ in range(per_stage)]
        assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("network", ["resnet", "wide_resnet"])
def test_pictures_and_kernels_lie_channels_last(network) -> None:
    task = make_cifar(network, width=8, depth=10 if network == "wide_resnet" else 8)
    (batch,) = iterate_batches(task, 1, 0)
    module = task.make(task.width, task.depth)
    for tensor in (batch[0], *(layer.weight for layer in convolutions(module))):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


# Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("setting", ["small", "full"])
def test_text_is_read_for_each_setting(folder: Path, setting: str) -> None:
    task = read_task("characters", setting, folder, folder / "cache")
    assert isinstance(task, Characters)
    assert task.recipe == find_recipe("characters", setting)
    assert task.width % task.num_heads == 0
    content = (folder / TEXT).read_text(encoding="utf-8")
    assert sum(map(len, task.text.splits.values())) == len(content)


@pytest.mark.parametrize("setting", ["wide", "resnet"])
def test_pictures_are_read_for_each_setting(folder: Path, setting: str) -> None:
    task = read_task("cifar", setting, folder, folder / "cache")
    assert isinstance(task, Cifar)
    assert task.recipe == find_recipe("cifar", setting)
    assert len(task.pictures.splits["train"][0]) == 48
    assert (task.width, task.depth) == (task.widths[-1], task.depths[-1])


def test_small_setting_trains_on_fewer_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="48 pictures to train on, not 10000"):
        read_task("cifar", "small", folder, folder / "cache")
    asked = []

    def read_pictures(data_dir: Path, cache_dir: Path, *, num_train: int | None) -> Pictures:
        asked.append(num_train)
        return make_pictures()

    monkeypatch.setattr("quality.tasks.read_pictures", read_pictures)
    read_task("cifar", "small", folder, folder / "cache")
    assert asked == [10_000]


@pytest.mark.parametrize(("name", "setting"), [("cifar", "full"), ("speech", "small")])
def test_unknown_tasks_and_settings_are_key_errors(folder: Path, name: str, setting: str) -> None:
    with pytest.raises(KeyError):
        read_task(name, setting, folder, folder / "cache")
    with pytest.raises(KeyError):
        find_recipe(name, setting)


def test_tasks_may_have_another_recipe() -> None:
    task = make_characters()
    other = replace(task, recipe=replace(task.recipe, batch_size=2))
    assert next(iterate_batches(other, 1, 0))[0].shape == (2, 8)
