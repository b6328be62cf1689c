"""One to three architectures of each module of timm, with random weights and small pictures."""

from __future__ import annotations

import torchvision_ops as _before_timm  # isort: skip  # noqa: F401

from functools import partial

import timm
import torch
from torch import nn

from zoo_case import Case

# Taken before any of them was tried: of each module the smallest model, and the smallest ones with
# names that begin differently.
SMALL = (
    *("caformer_s18", "convmixer_768_32", "convnext_zepto_rms", "convnextv2_atto"),
    *("cpubone_nano", "cs3darknet_focus_s", "csatv2", "cspnext_tiny", "cspresnext50"),
    *("darknet17", "davit_tiny", "densenet121", "densenet264d", "densenetblur121d", "dla46_c"),
    *("dla46x_c", "dla60x_c", "dpn48b", "dpn68", "dpn68b", "eca_nfnet_l0", "eca_vovnet39b"),
    *("edgenext_xx_small", "efficientvim_m1", "efficientvit_b0", "ese_vovnet19b_slim_dw"),
    *("fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gemma4_vit_167m", "gernet_s"),
    *("ghostnet_050", "ghostnetv3_050", "hardcorenas_b", "hgnet_tiny", "hgnetv2_b0"),
    *("hieradet_small", "hrnet_w18_small", "iformer_t", "inception_next_atto"),
    *("lambda_resnet26t", "lcnet_035", "lcnetv2_small", "legacy_seresnet18", "legacy_xception"),
    *("lowformer_b0", "mambaout_femto", "mnasnet_small", "mobilenetv2_035"),
    *("mobilenetv3_small_050", "mobilenetv5_base", "mobileone_s1", "mobilevit_xxs"),
    *("mobilevitv2_050", "naflexvit_base_patch16_parfac_gap", "nasnetalarge", "nextvit_small"),
    *("nf_regnet_b0", "pnasnet5large", "poolformer_s12", "poolformerv2_s12", "pvt_v2_b0"),
    *("qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "regnety_002", "regnetz_005"),
    *("repghostnet_050", "repvit_m1", "res2net50_14w_8s", "res2net50d", "res2next50"),
    *("resnest14d", "resnest26d", "resnest50d_1s4x24d", "resnet10t", "resnet14t", "resnetv2_18"),
    *("rexnet_100", "rexnetr_100", "sam2_hiera_tiny", "selecsls42", "selecsls42b", "selecsls60b"),
    *("shvit_s1", "skresnet18", "skresnet50d", "skresnext50_32x4d", "starnet_s050"),
    *("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"),
    *("test_resnet", "tf_mobilenetv3_small_075", "tiny_vit_5m_224", "tresnet_m", "vgg11"),
    *("vovnet39a", "xception41", "xception41p", "xception65p"),
)
# These take the size of their pictures as an argument.
SIZED = (
    *("beit_base_patch16_224", "beitv2_base_patch16_224", "cait_xxs24_224", "coat_tiny"),
    *("coatnet_pico_rw_224", "convit_tiny", "deit_tiny_patch16_224", "eca_botnext26ts_256"),
    *("efficientformerv2_s0", "efficientvit_m0", "eva02_tiny_patch14_224", "flexivit_small"),
    *("gcvit_xxtiny", "gmixer_12_224", "gmlp_ti16_224", "hiera_tiny_224", "levit_128s"),
    *("maxvit_pico_rw_256", "mvitv2_tiny", "nest_tiny", "pit_ti_224", "resmlp_12_224"),
    *("samvit_base_patch16_224", "sequencer2d_s", "swiftformer_xs"),
    *("swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window16_256"),
    *("test_coatnet", "test_vit", "test_vit_relpos", "tnt_s_legacy_patch16_224"),
    *("twins_svt_small", "visformer_tiny", "vit_srelpos_small_patch16_224"),
    *("vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224"),
    *("vitamin_small_224", "volo_d1_224", "xcit_nano_12_p8_224"),
)
# And these want larger pictures.
LARGER = {
    "crossvit_tiny_240": 240,
    "deepseek_vit_412m": 224,
    "efficientformer_l1": 224,
    "halonet_h1": 256,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}


def _make(name: str, **options: int) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def _draw(size: int, batch: int) -> tuple[tuple[torch.Tensor], dict[str, object]]:
    return (torch.randn(batch, 3, size, size),), {}


TIMM = {
    **{name: Case(partial(_make, name), partial(_draw, 64)) for name in SMALL},
    **{name: Case(partial(_make, name, img_size=64), partial(_draw, 64)) for name in SIZED},
    **{name: Case(partial(_make, name), partial(_draw, size)) for name, size in LARGER.items()},
}
