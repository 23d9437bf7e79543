"""Which language a text is in, by py3langid (naive Bayes over byte n-grams; its model is in its wheel)."""

import functools
from typing import Any

from spikescale.errors import UserError

CHARACTERS = 4000  # of a document's beginning, by which its language is judged


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(f"--language needs py3langid ({error}): pip install py3langid") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def known_languages() -> list[str]:
    """The ISO 639 codes that can be told apart."""
    return sorted(_identifier().labels)


def identify(text: str) -> tuple[str, float]:
    """The likeliest language of a text and its probability, 0 to 1, rounded to 4 places."""
    language, score = _identifier().classify(text[:CHARACTERS])
    return str(language), round(float(score), 4)
