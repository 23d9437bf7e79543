"""Text from a trained model, token by token, with a state of constant size."""

from spikescale.inference.generate import generate
from spikescale.inference.sampling import SamplingSettings
from spikescale.inference.text import complete, stream_text

__all__ = ["SamplingSettings", "complete", "generate", "stream_text"]
