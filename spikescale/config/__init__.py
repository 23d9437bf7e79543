"""One typed tree of settings: `load_config` reads it, everything else receives a part of it."""

from spikescale.config.load import load_config, load_model_preset
from spikescale.config.schema import (
    DataConfig,
    FaultConfig,
    MlflowConfig,
    ModelConfig,
    NeuronConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "DataConfig",
    "FaultConfig",
    "MlflowConfig",
    "ModelConfig",
    "NeuronConfig",
    "ParallelConfig",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    "ZeroConfig",
    "load_config",
    "load_model_preset",
]
