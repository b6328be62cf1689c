"""Architectures of Hugging Face transformers, from small configurations with random weights."""

from __future__ import annotations

import torchvision_ops as _before_transformers  # isort: skip  # noqa: F401

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zoo_case import Case, Inputs

VOCABULARY = 96
TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED = {"num_key_value_heads": 2}  # queries share keys and values
TWO_STACKS = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64},
    **{"decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2},
    **{"num_heads": 4, "decoder_start_token_id": 0},
}
PICTURE = {
    **{"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 64},
}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}
HEADS = {"num_attention_heads": [1, 2, 2, 4]}
WINDOWS = {
    **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2]},
    **{"num_heads": [2, 4], "window_size": 4},
}
SPEECH = {
    **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2)},
    **{"conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}


def _make(config: str, model: str, options: dict[str, Any]) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def case(stem: str, model: str, draw: Callable[[int], dict[str, Any]], **options: Any) -> Case:
    """A model class of an architecture, with its configuration."""

    def inputs(batch: int) -> Inputs:
        return (), draw(batch)

    return Case(partial(_make, f"{stem}Config", f"{stem}{model}", options), inputs)


def tokens(batch: int, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def words(batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch)}


def masked(batch: int) -> dict[str, Any]:
    return {**words(batch), "attention_mask": torch.ones(batch, 12, dtype=torch.long)}


def pairs(batch: int) -> dict[str, Any]:
    return {**masked(batch), "decoder_input_ids": tokens(batch, 7)}


def pictures(batch: int, size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def captioned(batch: int) -> dict[str, Any]:
    return {**masked(batch), **pictures(batch)}


def sounds(batch: int) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 2000)}


larger = partial(pictures, size=64)


def encoder(stem: str, draw: Callable[[int], dict[str, Any]] = masked, **options: Any) -> Case:
    return case(stem, "ForMaskedLM", draw, **{**TEXT, **options})


def decoder(stem: str, draw: Callable[[int], dict[str, Any]] = masked, **options: Any) -> Case:
    return case(stem, "ForCausalLM", draw, **{**TEXT, **options})


def classifier(stem: str, draw: Callable[[int], dict[str, Any]] = pictures, **options: Any) -> Case:
    return case(stem, "ForImageClassification", draw, num_labels=5, **options)


ENCODERS = {
    "albert": encoder("Albert", embedding_size=16),
    "bert": encoder("Bert"),
    "big_bird": encoder("BigBird", attention_type="original_full"),
    "camembert": encoder("Camembert"),
    "convbert": encoder("ConvBert", embedding_size=16, head_ratio=2, conv_kernel_size=3),
    "data2vec_text": encoder("Data2VecText"),
    "deberta": encoder("Deberta"),
    "deberta_v2": encoder("DebertaV2"),
    "distilbert": encoder("DistilBert"),
    "electra": encoder("Electra", embedding_size=16),
    "esm": encoder("Esm", mask_token_id=3),
    "fnet": encoder("FNet", words),
    "funnel": case(
        *("Funnel", "ForMaskedLM", masked),
        **{"vocab_size": VOCABULARY, "block_sizes": [1, 1], "num_decoder_layers": 1},
        **{"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    ),
    "ibert": encoder("IBert"),
    "layoutlm": encoder("LayoutLM"),
    "longformer": encoder("Longformer", attention_window=[4, 4], max_position_embeddings=80),
    "megatron_bert": encoder("MegatronBert"),
    "mobilebert": encoder(
        "MobileBert",
        **{"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        num_feedforward_networks=2,
    ),
    "modernbert": encoder(
        "ModernBert", cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2
    ),
    "mpnet": encoder("MPNet"),
    "mra": encoder("Mra"),
    "nystromformer": encoder("Nystromformer", words, segment_means_seq_len=12, num_landmarks=4),
    "perceiver": case(
        *("Perceiver", "ForMaskedLM"),
        lambda batch: {"inputs": tokens(batch)},
        **{"vocab_size": VOCABULARY, "d_model": 32, "d_latents": 32, "num_latents": 8},
        **{"num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4},
        **{"num_cross_attention_heads": 4, "max_position_embeddings": 12},
        **{"qk_channels": 32, "v_channels": 32},
    ),
    "rembert": encoder("RemBert"),
    "roberta": encoder("Roberta"),
    "roformer": encoder("RoFormer", embedding_size=32),
    "squeezebert": encoder(
        "SqueezeBert",
        **{"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2},
        **{"post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2},
    ),
    "xlm_roberta": encoder("XLMRoberta"),
    "xmod": encoder("Xmod", languages=["a", "b"], default_language="a"),
    "yoso": encoder("Yoso"),
}
DECODERS = {
    "bloom": decoder("Bloom"),
    "codegen": decoder("CodeGen", rotary_dim=4),
    "cohere": decoder("Cohere", **GROUPED),
    "deepseek_v3": decoder(
        "DeepseekV3",
        **{"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
        **{"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "falcon": decoder("Falcon"),
    "gemma": decoder("Gemma", head_dim=8, **GROUPED),
    "gemma2": decoder("Gemma2", head_dim=8, sliding_window=8, **GROUPED),
    "gpt2": case("GPT2", "LMHeadModel", masked, **TEXT),
    "gpt_neo": decoder("GPTNeo", attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": decoder("GPTNeoX"),
    "gptj": decoder("GPTJ", rotary_dim=4),
    "granite": decoder("Granite", **GROUPED),
    "jamba": decoder(
        "Jamba",
        **{"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1},
        **{"use_mamba_kernels": False, "mamba_d_state": 4, **GROUPED},
    ),
    "llama": decoder("Llama", **GROUPED),
    "mamba": decoder("Mamba", words, state_size=4),
    "mamba2": decoder(
        "Mamba2", words, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4
    ),
    "mistral": decoder("Mistral", sliding_window=8, **GROUPED),
    "mixtral": decoder("Mixtral", num_local_experts=4, **GROUPED),
    "mpt": decoder("Mpt", max_seq_len=64),
    "olmo": decoder("Olmo", **GROUPED),
    "olmo2": decoder("Olmo2", **GROUPED),
    "opt": decoder("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "phi": decoder("Phi", **GROUPED),
    "phi3": decoder("Phi3", **GROUPED),
    "qwen2": decoder("Qwen2", **GROUPED),
    "qwen2_moe": decoder(
        "Qwen2Moe",
        **{"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        **{"num_experts_per_tok": 2, **GROUPED},
    ),
    "qwen3": decoder("Qwen3", head_dim=8, **GROUPED),
    "rwkv": decoder("Rwkv", attention_hidden_size=32),
    "stablelm": decoder("StableLm", **GROUPED),
    "starcoder2": decoder("Starcoder2", **GROUPED),
    "xglm": decoder("XGLM", d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
}
ENCODER_DECODERS = {
    "bart": case("Bart", "ForConditionalGeneration", pairs, **TWO_STACKS),
    "blenderbot": case("Blenderbot", "ForConditionalGeneration", pairs, **TWO_STACKS),
    "m2m_100": case("M2M100", "ForConditionalGeneration", pairs, **TWO_STACKS),
    "marian": case("Marian", "MTModel", pairs, **TWO_STACKS),
    "mbart": case("MBart", "ForConditionalGeneration", pairs, **TWO_STACKS),
    "mt5": case("MT5", "ForConditionalGeneration", pairs, **T5),
    "pegasus": case("Pegasus", "ForConditionalGeneration", pairs, **TWO_STACKS),
    "switch_transformers": case(
        *("SwitchTransformers", "ForConditionalGeneration", pairs),
        **{**T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1},
        **{"num_sparse_decoder_layers": 1, "num_experts": 2, "expert_capacity": 16},
    ),
    "t5": case("T5", "ForConditionalGeneration", pairs, **T5),
}
VISION = {
    "beit": classifier("Beit", **PICTURE),
    "convnext": classifier("ConvNext", **STAGES),
    "convnextv2": classifier("ConvNextV2", **STAGES),
    "data2vec_vision": classifier("Data2VecVision", **PICTURE),
    "deit": classifier("DeiT", **PICTURE),
    "detr": case(
        *("Detr", "ForObjectDetection"),
        lambda batch: {**larger(batch), "pixel_mask": torch.ones(batch, 64, 64, dtype=torch.long)},
        **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            out_features=["stage2"],
        ),
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "num_labels": 4},
    ),
    "dinov2": classifier("Dinov2", **PICTURE),
    "efficientnet": classifier(
        "EfficientNet", width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320
    ),
    "levit": classifier(
        *("Levit", larger),
        **{"image_size": 64, "hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 4, 4]},
        **{"depths": [1, 1, 1], "key_dim": [4, 4, 4]},
    ),
    "mobilenet_v2": classifier("MobileNetV2", depth_multiplier=0.25),
    "mobilevit": classifier(
        *("MobileViT", larger),
        **{"image_size": 64, "hidden_sizes": [16, 16, 24], "num_attention_heads": 4},
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
    ),
    "poolformer": classifier("PoolFormer", larger, **STAGES),
    "pvt": classifier("Pvt", larger, image_size=64, **{**STAGES, **HEADS, "depths": [1] * 4}),
    "regnet": classifier("RegNet", embedding_size=8, groups_width=4, **STAGES),
    "resnet": classifier("ResNet", embedding_size=8, layer_type="basic", **STAGES),
    "segformer": case(
        *("Segformer", "ForSemanticSegmentation", larger),
        **{**STAGES, **HEADS, "depths": [1] * 4, "decoder_hidden_size": 16, "num_labels": 5},
    ),
    "swin": classifier("Swin", **WINDOWS),
    "swinv2": classifier("Swinv2", **WINDOWS),
    "vit": classifier("ViT", **PICTURE),
    "vit_mae": case(
        *("ViTMAE", "ForPreTraining", pictures),
        **{**PICTURE, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1},
        **{"decoder_num_attention_heads": 4, "decoder_intermediate_size": 64},
    ),
    "yolos": case(
        *("Yolos", "ForObjectDetection", pictures),
        **{**PICTURE, "image_size": [32, 32], "num_detection_tokens": 4, "num_labels": 5},
    ),
}
SOUND_AND_SERIES = {
    "ast": case(
        *("AST", "ForAudioClassification"),
        lambda batch: {"input_values": torch.randn(batch, 32, 16)},
        **{**PICTURE, "max_length": 32, "num_mel_bins": 16},
    ),
    "decision_transformer": case(
        *("DecisionTransformer", "Model"),
        lambda batch: {
            "states": torch.randn(batch, 5, 17),
            "actions": torch.randn(batch, 5, 4),
            "rewards": torch.randn(batch, 5, 1),
            "returns_to_go": torch.randn(batch, 5, 1),
            "timesteps": torch.arange(5).repeat(batch, 1),
            "attention_mask": torch.ones(batch, 5, dtype=torch.long),
        },
        **{"hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "encodec": case(
        *("Encodec", "Model"),
        lambda batch: {"input_values": torch.randn(batch, 1, 640)},
        **{"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16},
        **{"upsampling_ratios": [4, 2], "target_bandwidths": [24.0], "num_lstm_layers": 1},
    ),
    "hubert": case("Hubert", "ForCTC", sounds, **SPEECH),
    "speech_to_text": case(
        *("Speech2Text", "ForConditionalGeneration"),
        lambda batch: {
            "input_features": torch.randn(batch, 40, 16),
            "attention_mask": torch.ones(batch, 40, dtype=torch.long),
            "decoder_input_ids": tokens(batch, 7),
        },
        **{**TWO_STACKS, "input_feat_per_channel": 16, "conv_channels": 16},
        **{"num_conv_layers": 2, "conv_kernel_sizes": (3, 3)},
        **{"max_source_positions": 40, "max_target_positions": 20},
    ),
    "time_series_transformer": case(
        *("TimeSeriesTransformer", "ForPrediction"),
        lambda batch: {
            "past_values": torch.randn(batch, 12),
            "past_time_features": torch.randn(batch, 12, 2),
            "past_observed_mask": torch.ones(batch, 12),
            "future_values": torch.randn(batch, 4),
            "future_time_features": torch.randn(batch, 4, 2),
        },
        **{"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 4]},
        **{"num_time_features": 2, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "vits": case(
        *("Vits", "Model", words),
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "ffn_dim": 32, "flow_size": 16, "spectrogram_bins": 17},
        **{"prior_encoder_num_wavenet_layers": 2, "posterior_encoder_num_wavenet_layers": 2},
        **{"upsample_initial_channel": 16, "upsample_rates": [4, 4]},
        **{"upsample_kernel_sizes": [8, 8], "duration_predictor_filter_channels": 16},
        **{"wavenet_dilation_rate": 1, "prior_encoder_num_flows": 2},
        depth_separable_num_layers=2,
    ),
    "wav2vec2": case("Wav2Vec2", "ForCTC", sounds, **SPEECH),
    "wavlm": case("WavLM", "ForCTC", sounds, **SPEECH),
    "whisper": case(
        *("Whisper", "ForConditionalGeneration"),
        lambda batch: {
            "input_features": torch.randn(batch, 16, 40),
            "decoder_input_ids": tokens(batch, 7),
        },
        **{**TWO_STACKS, "num_mel_bins": 16, "max_source_positions": 20},
        max_target_positions=20,
    ),
}
SEVERAL = {
    "blip": case(
        *("Blip", "ForConditionalGeneration", captioned),
        text_config={**TEXT, "encoder_hidden_size": 32, "projection_dim": 16},
        **{"vision_config": PICTURE, "projection_dim": 16},
    ),
    "clip": case("CLIP", "Model", captioned, text_config=TEXT, vision_config=PICTURE),
    "llava": case(
        *("Llava", "ForConditionalGeneration"),
        lambda batch: {
            "input_ids": torch.cat([torch.full((batch, 16), 95), tokens(batch, 6) % 90], 1),
            "attention_mask": torch.ones(batch, 22, dtype=torch.long),
            **pictures(batch),
        },
        text_config=transformers.LlamaConfig(**TEXT, **GROUPED),
        vision_config=transformers.CLIPVisionConfig(**PICTURE),
        **{"image_token_index": 95, "vision_feature_layer": -1},
        vision_feature_select_strategy="default",
    ),
    "siglip": case(
        *("Siglip", "Model"),
        lambda batch: {**words(batch), **pictures(batch)},
        **{"text_config": TEXT, "vision_config": PICTURE},
    ),
    "vilt": case("Vilt", "Model", captioned, **{**TEXT, **PICTURE}),
}
HUGGING_FACE = {
    **ENCODERS,
    **DECODERS,
    **ENCODER_DECODERS,
    **VISION,
    **SOUND_AND_SERIES,
    **SEVERAL,
}
