from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from quality import data
from quality.data import PICTURES, TEXT, DataError, Pictures, read_pictures, read_text
from tiny_tasks import NUM_PICTURES, name_picture, write_pictures, write_text

NUM_TRAIN, NUM_VALID, NUM_TEST = 48, 12, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and in ``cache`` what is decoded."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder)
    return folder


def names_of(pictures: Pictures, split: str) -> list[tuple[str, int, int]]:
    return [name_picture(picture) for picture in pictures.splits[split][0]]


def test_absent_text_is_named_with_its_folder_and_option(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_text(tmp_path / "data")
    for word in (TEXT, str(tmp_path / "data"), "--data-dir"):
        assert word in str(caught.value)


def test_absent_pictures_are_named_with_their_folder_and_option(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_pictures(tmp_path / "data", tmp_path)
    for word in (PICTURES, str(tmp_path / "data"), "--data-dir"):
        assert word in str(caught.value)


def test_splits_of_a_text_follow_each_other_and_are_all_of_it(tmp_path: Path) -> None:
    content = write_text(tmp_path)
    text = read_text(tmp_path)
    characters = sorted(set(content))
    assert text.num_tokens == len(characters)
    pieces = {
        split: "".join(characters[number] for number in numbers)
        for split, numbers in text.splits.items()
    }
    assert pieces["train"] + pieces["valid"] + pieces["test"] == content
    assert len(pieces["valid"]) == pytest.approx(0.05 * len(content), abs=1)
    assert len(pieces["test"]) == pytest.approx(0.05 * len(content), abs=1)


def test_pictures_keep_their_labels(folder: Path) -> None:
    pictures = read_pictures(folder, folder / "cache")
    for split, (values, labels) in pictures.splits.items():
        assert values.dtype == torch.uint8
        assert values.shape[1:] == (3, 32, 32)
        assert [label for _, label, _ in names_of(pictures, split)] == labels.tolist()


def test_each_picture_is_in_one_split_and_tests_are_the_archives(folder: Path) -> None:
    pictures = read_pictures(folder, folder / "cache")
    names = {split: names_of(pictures, split) for split in pictures.splits}
    sizes = {"train": NUM_TRAIN, "valid": NUM_VALID, "test": NUM_TEST}
    assert {split: len(own) for split, own in names.items()} == sizes
    expected = {
        (split, label, index)
        for split, number in NUM_PICTURES.items()
        for label in range(10)
        for index in range(number)
    }
    together = names["train"] + names["valid"] + names["test"]
    assert len(set(together)) == len(together)
    assert set(together) == expected
    assert {split for split, _, _ in names["test"]} == {"test"}


def test_pictures_are_not_in_the_order_of_the_archive(folder: Path) -> None:
    pictures = read_pictures(folder, folder / "cache")
    for _, labels in pictures.splits.values():
        assert labels.tolist() != sorted(labels.tolist())


@pytest.mark.parametrize("num_train", [1, 20, NUM_TRAIN, None])
def test_validation_pictures_are_the_same_for_any_number_to_train_on(
    folder: Path, num_train: int | None
) -> None:
    everything = read_pictures(folder, folder / "cache")
    pictures = read_pictures(folder, folder / "cache", num_train=num_train)
    assert len(pictures.splits["train"][0]) == (NUM_TRAIN if num_train is None else num_train)
    assert names_of(pictures, "valid") == names_of(everything, "valid")
    assert names_of(pictures, "test") == names_of(everything, "test")
    assert not set(names_of(pictures, "train")) & set(names_of(pictures, "valid"))


def test_too_many_pictures_to_train_on_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=f"has {NUM_TRAIN} pictures to train on, not 49"):
        read_pictures(folder, folder / "cache", num_train=NUM_TRAIN + 1)


def test_mean_and_deviation_are_those_of_the_training_pictures(folder: Path) -> None:
    pictures = read_pictures(folder, folder / "cache", num_train=30)
    values = pictures.splits["train"][0].numpy().astype(np.float64) / 255
    by_channel = values.transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(pictures.mean, by_channel.mean(1), rtol=1e-5)
    np.testing.assert_allclose(pictures.std, by_channel.std(1, ddof=1), rtol=1e-4)


def test_archive_is_decoded_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_dir = tmp_path / "new" / "cache"
    first = read_pictures(folder, cache_dir)
    assert len(list(cache_dir.iterdir())) == 1

    def open_archive(*args: object, **options: object) -> None:
        raise AssertionError("the archive is read again")

    monkeypatch.setattr(tarfile, "open", open_archive)
    second = read_pictures(folder, cache_dir)
    for split, (pictures, labels) in first.splits.items():
        assert torch.equal(second.splits[split][0], pictures)
        assert torch.equal(second.splits[split][1], labels)


def test_two_processes_may_decode_at_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, others = np.savez, []

    def save_beside_another(file: object, **arrays: np.ndarray) -> None:
        save(file, **arrays)
        if not others:  # the other one starts later and ends earlier
            others.append(True)
            others.append(read_pictures(folder, tmp_path / "cache"))

    monkeypatch.setattr(data.np, "savez", save_beside_another)
    pictures = read_pictures(folder, tmp_path / "cache")
    assert names_of(pictures, "train") == names_of(others[1], "train")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_kill_while_decoding_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_a_part(file: object, **arrays: np.ndarray) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.np, "savez", save_a_part)
        with pytest.raises(KeyboardInterrupt):
            read_pictures(folder, tmp_path / "cache")
    assert len(read_pictures(folder, tmp_path / "cache").splits["train"][0]) == NUM_TRAIN


def test_archive_without_the_two_folders_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / PICTURES, "w:xz") as tar:
        tar.add(__file__, "images/class0/0000.jpg")
    with pytest.raises(DataError, match="has no files train/<class>/… and test/<class>/…"):
        read_pictures(tmp_path, tmp_path / "cache")
