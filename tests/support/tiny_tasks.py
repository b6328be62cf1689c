"""A text and pictures of a few kilobytes, and tasks that train in moments."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from quality.data import PICTURES, TEXT, Pictures, Text
from quality.tasks import Characters, Cifar, Recipe

CLASSES = tuple(f"class{number}" for number in range(10))
NUM_PICTURES = {"train": 6, "test": 2}  # of each class
RECIPE = Recipe(steps=5, batch_size=4, optimizer="adamw", lr=0.01, weight_decay=0.1)
SENTENCE = "to be, or not to be: that is the question. "


def write_data(folder: Path) -> Path:
    """Write both files that the tasks read, and return their folder."""
    write_text(folder)
    write_pictures(folder)
    return folder


def write_text(folder: Path) -> str:
    """Write lines of a dialogue, some 4,000 characters, and return them."""
    speakers = ("ALICE", "BOB", "CAROL")
    lines = [f"{speakers[k % 3]}:\n{SENTENCE[k % 11 :]}{k}\n\n" for k in range(80)]
    text = "".join(lines)
    (folder / TEXT).write_text(text, encoding="utf-8")
    return text


def write_pictures(folder: Path) -> None:
    """Write an archive like that of CIFAR-10; ``name_picture`` says which picture is which."""
    with tarfile.open(folder / PICTURES, "w:xz") as tar:
        _add(tar, "README.txt", b"no picture")
        for split, number in NUM_PICTURES.items():
            for label, name in enumerate(CLASSES):
                for index in range(number):
                    colour = (25 * label, 40 * index, 255 if split == "test" else 0)
                    content = io.BytesIO()
                    picture = Image.new("RGB", (32, 32), colour)
                    picture.save(content, "JPEG", quality=100, subsampling=0)
                    _add(tar, f"{split}/{name}/{index:04}.jpg", content.getvalue())


def name_picture(picture: Tensor) -> tuple[str, int, int]:
    """Read split, label and number within the class off a ``(3, 32, 32)`` picture."""
    red, green, blue = picture.float().mean((1, 2)).tolist()
    return "test" if blue > 128 else "train", round(red / 25), round(green / 40)


def make_text(content: str = SENTENCE * 20) -> Text:
    """All of a text for training, and pieces of it for the other splits."""
    known = {character: number for number, character in enumerate(sorted(set(content)))}
    numbers = torch.tensor([known[character] for character in content])
    splits = {"train": numbers, "valid": numbers[:101], "test": numbers[50:170]}
    return Text(num_tokens=len(known), splits=splits)


def make_pictures(number: int = 12) -> Pictures:
    """Noise; in each split the pictures are labelled 0, 1, 2 and so on, modulo 10."""
    random = torch.Generator().manual_seed(0)
    splits = {}
    for split in ("train", "valid", "test"):
        pictures = torch.randint(256, (number, 3, 32, 32), generator=random, dtype=torch.uint8)
        splits[split] = (pictures, torch.arange(number) % 10)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.25])
    return Pictures(splits=splits, mean=mean, std=std)


def make_characters(
    *, text: Text | None = None, width: int = 8, depth: int = 2, **recipe: Any
) -> Characters:
    """A decoder with two heads that reads 8 characters."""
    return Characters(
        recipe=replace(RECIPE, **recipe),
        text=make_text() if text is None else text,
        width=width,
        depth=depth,
        num_heads=2,
        context=8,
    )


def make_cifar(
    network: Literal["wide_resnet", "resnet"] = "resnet",
    *,
    pictures: Pictures | None = None,
    width: int = 4,
    depth: int = 8,
    **recipe: Any,
) -> Cifar:
    """A residual network with a few channels."""
    return Cifar(
        recipe=replace(RECIPE, **{"optimizer": "sgd", **recipe}),
        pictures=make_pictures() if pictures is None else pictures,
        network=network,
        width=width,
        depth=depth,
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
