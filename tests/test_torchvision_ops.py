"""The stand-in for torchvision's own operators, and that only tests need torchvision."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

import torchvision_ops

ROOT = Path(__file__).parents[1]


def overlap(one: list[float], other: list[float]) -> float:
    """Intersection over union of two boxes."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left, 0.0) * max(bottom - top, 0.0)

    (a, b, c, d), (e, f, g, h) = one, other
    both = area(max(a, e), max(b, f), min(c, g), min(d, h))
    return both / (area(a, b, c, d) + area(e, f, g, h) - both)


def keep(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    """Go through the boxes from best to worst; keep those that overlap none that is kept."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_boxes", [0, 1, 2, 30, 100])
def test_nms_keeps_what_a_loop_over_boxes_keeps(num_boxes, threshold):
    noise = torch.Generator().manual_seed(num_boxes)
    # Small whole numbers: areas are exact, and many overlaps equal a threshold.
    start = torch.randint(0, 12, (num_boxes, 2), generator=noise)
    boxes = torch.cat([start, start + torch.randint(1, 8, start.shape, generator=noise)], 1).float()
    scores = torch.randperm(num_boxes, generator=noise).float()
    kept = torchvision_ops.nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == keep(boxes.tolist(), scores.tolist(), threshold)


def test_nms_keeps_a_box_that_overlaps_by_the_threshold_exactly():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 2.0, 2.0]])  # half of the union
    scores = torch.tensor([0.5, 1.0])
    assert torchvision_ops.nms(boxes, scores, 0.5).tolist() == [1, 0]
    assert torchvision_ops.nms(boxes, scores, 0.499).tolist() == [1]


def test_nothing_is_declared_a_second_time():
    library = torch.library.Library("torchvision", "FRAGMENT")
    assert torchvision_ops.declare_missing(library) == []
    assert all(hasattr(torch.ops.torchvision, name) for name in torchvision_ops.SCHEMAS)


def test_torchvision_can_be_imported_and_its_operator_runs():
    importlib.import_module("torchvision.ops")
    boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 2), torch.tensor([0.5, 1.0])
    assert torch.ops.torchvision.nms(boxes, scores, 0.5).tolist() == [1]


@pytest.mark.parametrize("folder", ["npas_fx", "passes", "solvers"])
def test_the_library_imports_neither_torchvision_nor_timm(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = {name.partition(".")[0] for name in names}
            assert not found & {"torchvision", "timm"}, f"{path}:{node.lineno}"
