"""Classifiers of texts: SpikeGPT with a head, and the neural networks it is compared with.

All are called as `logits = model(ids, mask)` with ids (B, T) and mask (B, T), 0 at the padding, which is on
the right.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from spikescale.finetune.pooling import ClassificationHead, mean_over_text
from spikescale.model import SpikeGPT

Encoder = Callable[[Sequence[str]], list[list[int]]]
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


class SpikeClassifier(nn.Module):
    """SpikeGPT, the mean over its tokens' vectors, two linear layers (SpikeGPT Sec. 3.6)."""

    def __init__(self, model: SpikeGPT, labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        width = model.config.width
        model.head = nn.Identity()
        self.spikegpt = model
        self.classifier = ClassificationHead(width, width, labels, dropout).initialise()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, labels)."""
        hidden, _ = self.spikegpt(ids)
        return self.classifier(mean_over_text(hidden, mask))


class LSTMClassifier(nn.Module):
    """One LSTM layer over learnt word vectors; its last output and a linear layer."""

    def __init__(self, words: int, labels: int, width: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, labels)
        self.dropout = dropout

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, labels)."""
        x = F.dropout(self.embedding(ids), self.dropout, self.training)
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        logits: Tensor = self.out(F.dropout(last[-1], self.dropout, self.training))
        return logits


class TextCNN(nn.Module):
    """Convolutions over 3, 4 and 5 words, their largest values, a linear layer (Kim 2014)."""

    SIZES = (3, 4, 5)

    def __init__(
        self, words: int, labels: int, width: int = 128, filters: int = 100, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, filters, size) for size in self.SIZES)
        self.out = nn.Linear(filters * len(self.SIZES), labels)
        self.dropout = dropout

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, labels)."""
        x = self.embedding(ids) * mask[..., None]
        # Zeros on both sides, as many as a filter can reach: a text shorter than a filter has a value, too.
        x = F.pad(x.transpose(1, 2), (max(self.SIZES) - 1, max(self.SIZES) - 1))
        largest = [F.relu(convolution(x)).amax(2) for convolution in self.convolutions]
        logits: Tensor = self.out(F.dropout(torch.cat(largest, 1), self.dropout, self.training))
        return logits


class WordVocabulary:
    """Lower-case words and punctuation marks that occur at least twice in the training texts.

    Ids: 0 padding, 1 for every other word, then words by falling frequency.
    """

    def __init__(self, texts: Sequence[str], most: int = 20_000) -> None:
        counts = Counter(word for text in texts for word in self.words(text))
        kept = sorted((word for word, count in counts.items() if count > 1), key=lambda w: (-counts[w], w))
        self._ids = {word: number for number, word in enumerate(kept[:most], start=2)}

    def __len__(self) -> int:
        return len(self._ids) + 2

    @staticmethod
    def words(text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text.lower())

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; at least one."""
        return [[self._ids.get(word, 1) for word in self.words(text)] or [1] for text in texts]
