"""Text that a corpus was published with spaces in, brought back to how it is written.

WikiText sets punctuation apart with spaces and marks the separators inside numbers and words as `@,@`,
`@.@` and `@-@`. A model of ordinary text is judged on ordinary text, and its loss divided by the words of
the text as published: that is the word-level perplexity that papers compare.
"""

import re
from collections.abc import Callable

from spikescale.errors import UserError

# The joiner, then what stands at its left and at its right. In this order.
_WIKITEXT: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 and well @-@ known
        (r"s ' ", "s' "),  # the players ' wages
        (r" ' (s|re|ve|ll|d|m|t)\b", r"'\1"),
        (r" '(s|re|ve|ll|d|m|t)\b", r"'\1"),
        (r" n't\b", "n't"),
        (r" ([.,:;!?])(?=[ \n]|$)", r"\1"),
        (r"\( *([^()\n]*?) *\)", r"(\1)"),
        (r"\[ *([^\[\]\n]*?) *\]", r"[\1]"),
        (r"\{ *([^{}\n]*?) *\}", r"{\1}"),
        (r'" *([^"\n]*?) *"', r'"\1"'),
        (r"(?<= )' ([^'\n]*?) '(?=[ \n.,:;!?]|$)", r"'\1'"),
        (r"(?<==) (?==)", ""),  # = = Heading = =
        (r" *\n *", "\n"),
        (r" ° ", "°"),
    )
)


def detokenize_wikitext(text: str) -> str:
    """WikiText as it would be written: punctuation joined to its word, marked separators restored."""
    for pattern, replacement in _WIKITEXT:
        text = pattern.sub(replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"wikitext": detokenize_wikitext}


def detokenizer(name: str) -> Callable[[str], str]:
    """The function called `name`. Raises UserError for one that there is not."""
    if name not in DETOKENIZERS:
        raise UserError(f"detokenize {name!r}: must be one of {', '.join(DETOKENIZERS)}")
    return DETOKENIZERS[name]
