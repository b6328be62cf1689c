"""Every family of torchvision, with random weights and small pictures."""

from __future__ import annotations

import torchvision_ops  # isort: skip

from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.ops import boxes

from zoo_case import Case, Inputs

if torchvision_ops.MISSING:  # the stand-ins do
    boxes._assert_has_ops = lambda: None

PICTURES = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 128,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vit_b_32": 224,
    "wide_resnet50_2": 64,
}
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = (
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
    *("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
)
VIDEOS = ("mc3_18", "mvit_v1_b", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
FLOWS = ("raft_small",)


def _make(kind: str, name: str, **options: Any) -> nn.Module:
    module = getattr(models, kind) if kind else models
    return getattr(module, name)(**options)


def _pictures(size: int, batch: int) -> Inputs:
    return (torch.randn(batch, 3, size, size),), {}


def _frames(frames: int, size: int, batch: int) -> Inputs:
    return (torch.randn(batch, 3, frames, size, size),), {}


def _pairs(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 128, 128), torch.randn(batch, 3, 128, 128)), {}


def _labelled(name: str, batch: int) -> Inputs:
    """Pictures with one box each, which training wants."""
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    if name.startswith("maskrcnn"):
        target["masks"] = torch.ones(1, 96, 96, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        target["keypoints"] = torch.tensor([[[10.0, 10.0, 1.0]] * 17])
    return ([torch.rand(3, 96, 96) for _ in range(batch)], [dict(target) for _ in range(batch)]), {}


_PLAIN = {"weights": None, "weights_backbone": None}
_SMALL = {"num_classes": 4, **_PLAIN}
_FRAMES = {"mvit_v1_b": (16, 224), "s3d": (16, 224)}

TORCHVISION = {
    **{
        n: Case(partial(_make, "", n, weights=None), partial(_pictures, s))
        for n, s in PICTURES.items()
    },
    **{
        n: Case(partial(_make, "segmentation", n, **_SMALL), partial(_pictures, 64))
        for n in SEGMENTATION
    },
    **{
        n: Case(
            partial(_make, "detection", n, min_size=96, max_size=96, **_SMALL),
            partial(_labelled, n),
        )
        for n in DETECTION
    },
    "ssd300_vgg16": Case(
        partial(_make, "detection", "ssd300_vgg16", **_SMALL), partial(_labelled, "ssd300_vgg16")
    ),
    "ssdlite320_mobilenet_v3_large": Case(
        partial(_make, "detection", "ssdlite320_mobilenet_v3_large", **_SMALL),
        partial(_labelled, "ssdlite"),
    ),
    **{
        n: Case(
            partial(_make, "video", n, weights=None), partial(_frames, *_FRAMES.get(n, (8, 64)))
        )
        for n in VIDEOS
    },
    **{n: Case(partial(_make, "optical_flow", n, weights=None), _pairs) for n in FLOWS},
}
