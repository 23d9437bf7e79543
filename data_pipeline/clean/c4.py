"""C4's heuristics: lines are removed, then the document is judged by what is left of it."""

import re

from spikescale.data_pipeline.clean.rules import Limits

_TERMINAL = (".", "!", "?", '"', "”", "'", "’")
_ELLIPSES = ("...", "…")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?:\s|$)")


def c4(text: str, limits: Limits) -> tuple[str, str]:
    """What is left of a text, and the rule that drops it (empty: none).

    A line that ends in an ellipsis does not count as ended, as in the published code. Sentences are
    counted by their final punctuation; a line without any is one.
    """
    lowered = text.lower()
    if limits["c4.lorem_ipsum"] is not None and "lorem ipsum" in lowered:
        return text, "c4.lorem_ipsum"
    if limits["c4.curly_bracket"] is not None and ("{" in text or "}" in text):
        return text, "c4.curly_bracket"
    kept = [line for line in map(str.strip, text.split("\n")) if line and _keeps(line, limits)]
    least = limits["c4.sentences"]
    if least is not None and sum(max(1, len(_SENTENCE_END.findall(line))) for line in kept) < least:
        return text, "c4.sentences"
    if not kept:
        return text, "c4.no_lines"
    return "\n".join(kept), ""


def _keeps(line: str, limits: Limits) -> bool:
    if limits["c4.terminal_punctuation"] is not None and (
        not line.endswith(_TERMINAL) or line.endswith(_ELLIPSES)
    ):
        return False
    least = limits["c4.line_words"]
    if least is not None and len(line.split()) < least:
        return False
    lowered = line.lower()
    if limits["c4.javascript"] is not None and "javascript" in lowered:
        return False
    return limits["c4.policy"] is None or not any(phrase in lowered for phrase in _POLICY)
