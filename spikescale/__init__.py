"""spikescale: distributed pretraining of spiking language models."""

__version__ = "0.1.0"
