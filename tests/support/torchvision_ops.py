"""Lets torchvision, and so timm, be imported where torchvision's wheel does not fit torch.

The wheel that package indexes hold is built for CUDA. Next to a CPU build of torch its library
cannot be loaded, and ``import torchvision`` fails for want of the operator ``torchvision::nms``.
Importing this module first declares the operators that are missing, and no others.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_POOL = "Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_STEPS = "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h"
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"(Tensor input, {_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward": f"(Tensor grad, {_POOL}, SymInt batch_size, SymInt channels, "
    "SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    f"{_STEPS}, SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
}


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep the best box, drop those that overlap it by more than the threshold, and so on.

    Args:
        boxes: ``(N, 4)``: left, top, right, bottom.
        scores: ``(N,)``.
        iou_threshold: of intersection over union.

    Returns:
        Indices of the boxes that are kept, best first.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        start = torch.maximum(boxes[best, :2], boxes[left, :2])
        stop = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (stop - start).clamp(min=0).prod(1)
        left = left[shared <= iou_threshold * (area[best] + area[left] - shared)]
    return torch.stack(kept) if kept else left


def _load_own_library() -> None:
    """Load torchvision's operators where they fit: declared first, they could not be loaded."""
    found = find_spec("torchvision")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for library in Path(folder).glob("_C.*"):
            with suppress(OSError):
                torch.ops.load_library(library)


def declare_missing(library: torch.library.Library) -> list[str]:
    """Declare the operators that torchvision's import misses, and give ``nms`` a CPU kernel.

    Returns:
        Names of the operators that were missing.
    """
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        library.define(name + SCHEMAS[name])
    if "nms" in missing:
        library.impl("nms", nms, "CPU")
    return missing


_load_own_library()
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # what it declares lives as long
MISSING = declare_missing(_LIBRARY)
