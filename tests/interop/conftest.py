"""Model folders to convert."""

from collections.abc import Callable
from pathlib import Path

import pytest
from interop_cases import random_model

from spikescale.config import ModelConfig
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.model import SpikeGPT
from spikescale.model.store import save_model_folder


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[ModelConfig], tuple[SpikeGPT, Path]]:
    """Saves a random model of a configuration as a model folder; returns both."""

    def save(config: ModelConfig) -> tuple[SpikeGPT, Path]:
        model = random_model(config)
        folder = tmp_path / f"model-{config.variant}-{config.layers}-{config.neuron.tau}"
        info = {"step": 7, "tokens_seen": 700, "metrics": {"valid_loss": 2.5}}
        save_model_folder(folder, dict(model.named_parameters()), config, make_tokenizer("byte"), info)
        return model, folder

    return save
