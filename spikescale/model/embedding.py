"""From token ids to the first vectors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikescale.config.schema import NeuronConfig
from spikescale.model.neuron import Heaviside, NoNeuron


class Embedding(nn.Module):
    """Rows of a table, binarised by a Heaviside step if `binary` (SpikeGPT's binary embedding)."""

    def __init__(self, vocab_size: int, width: int, binary: bool, neuron: NeuronConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.neuron = Heaviside(neuron) if binary else NoNeuron()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> (B, T, C) in the table's dtype."""
        x, _ = self.neuron(F.embedding(tokens, self.weight), None, None)
        return x
