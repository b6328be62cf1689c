"""Real networks, by their shapes alone: on the meta device, without values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# timm imports torchvision, and torchvision's wheel for CUDA cannot be imported next to a CPU build
# of torch unless the operators that it misses are declared first.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
import torchvision_ops as _before_timm  # isort: skip  # noqa: F401

import timm
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def make_model(name: str) -> tuple[nn.Module, dict[str, Any] | None]:
    """Make a model, and the keyword arguments of an example where capture needs one.

    Args:
        name: ``gpt2``, ``llama_70b`` or a name of timm's.
    """
    with torch.device("meta"):
        words = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
        if name == "gpt2":
            return GPT2LMHeadModel(GPT2Config()), words
        if name == "llama_70b":
            return LlamaForCausalLM(LLAMA_70B), words
        return timm.create_model(name), None
