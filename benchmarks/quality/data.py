"""Read the data of the tasks from the folder that the user names."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from torch import Tensor

TEXT = "tinyshakespeare.txt"
PICTURES = "cifar10-jpeg.tar.xz"
FILE_OF = {"characters": TEXT, "cifar": PICTURES}  # task -> its file
# Shares of the text; the rest is for training.
VALID_SHARE = TEST_SHARE = 0.05
VALID_PICTURES = 5000


class DataError(Exception):
    """The data is not where it was said to be; the message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Characters as numbers, ``(N,)`` int64 each; the validation text follows the training text."""

    num_tokens: int
    splits: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """For each split pictures ``(N, 3, 32, 32)`` uint8 and labels ``(N,)``, in random order."""

    splits: dict[str, tuple[Tensor, Tensor]]
    mean: Tensor
    std: Tensor


def read_text(data_dir: Path) -> Text:
    """Read a text and cut it into training, validation and test text, in this order."""
    text = find_file(data_dir, TEXT).read_text(encoding="utf-8")
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    num_valid, num_test = round(len(text) * VALID_SHARE), round(len(text) * TEST_SHARE)
    num_train = len(text) - num_valid - num_test
    train, valid, test = torch.split(numbers, [num_train, num_valid, num_test])
    return Text(num_tokens=len(known), splits={"train": train, "valid": valid, "test": test})


def read_pictures(data_dir: Path, cache_dir: Path, *, num_train: int | None = None) -> Pictures:
    """Read the pictures; the decoded arrays are kept in ``cache_dir``.

    Args:
        data_dir: holds the archive.
        cache_dir: is made if need be.
        num_train: pictures to train on; by default all but those for validation, which are taken
            from the training pictures and are always the same.
    """
    archive = find_file(data_dir, PICTURES)
    cache = cache_dir / f"cifar10-{archive.stat().st_size}.npz"  # of this archive
    if not cache.exists():
        _decode(archive, cache)
    with np.load(cache) as arrays:
        loaded = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    pictures, labels = loaded["train_pictures"], loaded["train_labels"].long()
    num_valid = min(VALID_PICTURES, len(pictures) // 5)
    available = len(pictures) - num_valid
    if num_train is not None and num_train > available:
        raise DataError(f"{archive} has {available} pictures to train on, not {num_train}")
    last = num_valid + (available if num_train is None else num_train)
    train = pictures[num_valid:last]
    values = train.float() / 255
    return Pictures(
        splits={
            "train": (train, labels[num_valid:last]),
            "valid": (pictures[:num_valid], labels[:num_valid]),
            "test": (loaded["test_pictures"], loaded["test_labels"].long()),
        },
        mean=values.mean((0, 2, 3)),
        std=values.std((0, 2, 3)),
    )


def find_file(data_dir: Path, name: str) -> Path:
    """Where a file is.

    Raises:
        DataError: it is not there.
    """
    path = data_dir / name
    if not path.is_file():
        raise DataError(f"there is no file {name} in {data_dir}; pass its folder as --data-dir")
    return path


def _decode(archive: Path, cache: Path) -> None:
    from PIL import Image

    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(archive, "r:xz") as tar:
        for member in tar:
            parts = Path(member.name).parts
            file = tar.extractfile(member) if member.isfile() else None
            if file is None or len(parts) < 3 or parts[-3] not in found:
                continue
            with Image.open(io.BytesIO(file.read())) as picture:
                found[parts[-3]].append((parts[-2], np.asarray(picture.convert("RGB"))))
    if not found["train"] or not found["test"]:
        raise DataError(f"{archive} has no files train/<class>/… and test/<class>/…")
    classes = sorted({name for name, _ in found["train"]})
    arrays: dict[str, np.ndarray] = {}
    for split, items in found.items():
        # The archive lists class after class.
        order = np.random.default_rng(0).permutation(len(items))
        pictures = np.stack([items[k][1] for k in order]).transpose(0, 3, 1, 2)
        arrays[f"{split}_pictures"] = np.ascontiguousarray(pictures)
        arrays[f"{split}_labels"] = np.array([classes.index(items[k][0]) for k in order])
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may decode at once: each has a file of its own.
    with NamedTemporaryFile(dir=cache.parent, suffix=".npz", delete=False) as unfinished:
        np.savez(unfinished, **arrays)  # type: ignore[arg-type]
    Path(unfinished.name).replace(cache)
