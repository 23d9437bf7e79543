"""How well a model predicts a split: the language model's own loss, and the n-gram model it must beat."""

from spikescale.evaluation.language_model import LanguageModelResult, evaluate_tokens
from spikescale.evaluation.ngram import ByteTrigram

__all__ = ["ByteTrigram", "LanguageModelResult", "evaluate_tokens"]
