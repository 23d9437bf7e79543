"""Workloads and models that the tests of the planner share."""

from spikescale.config import load_model_preset
from spikescale.config.schema import ModelConfig, ParallelConfig, TrainConfig, ZeroConfig
from spikescale.planning.memory import Workload

PRESETS = {"tiny": 256, "46m": 256, "216m": 50277, "430m": 50277, "1b2": 50277}
VARIANTS = ("rwkv", "heaviside-rwkv", "spikegpt-b", "spikegpt", "spikegpt-driven")


def small(variant: str = "spikegpt", **changes) -> ModelConfig:
    """A model that a test can run."""
    shape = {"layers": 3, "width": 64, "vocab_size": 40, "context_length": 64, "binary_embedding": False}
    return ModelConfig(**{**shape, "variant": variant, **changes})


def workload(
    preset: str = "216m", ranks: int = 1, stage: int = 1, micro: int = 1, accumulation: int = 1, **changes
) -> Workload:
    """A preset on GPUs; `changes` go to the training, ZeRO and parallel settings by their names."""
    model = load_model_preset(preset, vocab_size=PRESETS[preset])
    zero = {key: changes.pop(key) for key in list(changes) if key in ZeroConfig.model_fields}
    parallel = {key: changes.pop(key) for key in list(changes) if key in ParallelConfig.model_fields}
    on_cpu = changes.pop("on_cpu", False)
    groups = parallel.get("tensor", 1) * parallel.get("context", 1)
    settings = {"batch_size": micro * accumulation * ranks // groups, "micro_batch_size": micro, **changes}
    return Workload(
        model,
        TrainConfig(**settings),
        ZeroConfig(stage=stage, **zero),
        ParallelConfig(**parallel),
        ranks=ranks,
        on_cpu=on_cpu,
    )
