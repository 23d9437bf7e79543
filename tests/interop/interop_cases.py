"""Tiny models whose weights are all random, so that no path through them is zero."""

import torch

from spikescale.config import ModelConfig
from spikescale.model import SpikeGPT

VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")


def tiny(variant: str = "spikegpt", **changes: object) -> ModelConfig:
    settings = {"layers": 3, "width": 24, "vocab_size": 256, "context_length": 32, "binary_embedding": False}
    return ModelConfig.model_validate({"variant": variant, **settings, **changes})


def random_model(config: ModelConfig, seed: int = 0) -> SpikeGPT:
    model = SpikeGPT(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.4 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.25
            )
    return model.eval()
