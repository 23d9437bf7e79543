"""Adult content by a list of words, a user's or a short built-in one."""

import re
from pathlib import Path

from spikescale.errors import UserError

# Words that hardly occur outside pornography (`xxx` does: programmers mark with it what is to be mended).
# English; for anything else give a list of your own.
_BUILT_IN = (
    "blowjob blowjobs bukkake camgirl camgirls creampie cumshot cumshots deepthroat dildo dildos fleshlight "
    "gangbang handjob handjobs hentai milf milfs porn porno pornhub pornstar pornstars rimjob threesome "
    "upskirt xhamster xvideos"
)
BUILT_IN = tuple(_BUILT_IN.split())


def read_word_list(choice: str) -> tuple[str, ...]:
    """The built-in words (`builtin`), or those of a file: a word or phrase a line, # begins a comment.

    Raises UserError when the file cannot be read or has no word.
    """
    if choice == "builtin":
        return BUILT_IN
    path = Path(choice)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of words ({error})") from None
    words = tuple(dict.fromkeys(" ".join(line.split("#")[0].lower().split()) for line in lines))
    words = tuple(word for word in words if word)
    if not words:
        raise UserError(f"{path}: holds no words")
    return words


class WordList:
    """Counts how often the words of a list stand in a text, whatever their case."""

    def __init__(self, words: tuple[str, ...]) -> None:
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        alternatives = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest_first)
        self._pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")

    def count(self, text: str) -> int:
        """Occurrences, as whole words."""
        return sum(1 for _ in self._pattern.finditer(text.lower()))
