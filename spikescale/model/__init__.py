"""The SpikeGPT family in plain PyTorch: `SpikeGPT`, its recurrent state, its loss."""

from spikescale.model.loss import language_model_loss
from spikescale.model.spikegpt import SpikeGPT
from spikescale.model.state import BlockState, State, detach_state

__all__ = ["BlockState", "SpikeGPT", "State", "detach_state", "language_model_loss"]
