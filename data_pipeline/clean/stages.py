"""The stages that look at one document at a time, in their order."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from spikescale.data_pipeline.clean.adult import WordList, read_word_list
from spikescale.data_pipeline.clean.c4 import c4
from spikescale.data_pipeline.clean.contamination import NgramIndex
from spikescale.data_pipeline.clean.quality import fineweb_measures, gopher_measures, repetition_measures
from spikescale.data_pipeline.clean.rules import GROUPS, first_broken
from spikescale.data_pipeline.clean.scrub import scrub
from spikescale.data_pipeline.clean.settings import CleanSettings
from spikescale.errors import UserError


class Verdict(NamedTuple):
    """A text after a stage, the rule that drops it (empty: kept), and its language where that was told."""

    text: str
    rule: str = ""
    language: str = ""


class Stage(NamedTuple):
    """A named step; `apply` is a pure function of the text."""

    name: str
    apply: Callable[[str], Verdict]


def make_stages(settings: CleanSettings, index: NgramIndex | None) -> list[Stage]:
    """The stages that `settings` ask for. Raises UserError for a language that is not known."""
    return list(_stages(settings, index))


def _stages(settings: CleanSettings, index: NgramIndex | None) -> Iterator[Stage]:
    if settings.fix_unicode:
        yield Stage("unicode", _repair())
    if settings.min_characters is not None or settings.max_characters is not None:
        yield Stage("length", lambda text: _length(text, settings))
    if settings.languages:
        yield Stage("language", _language(settings))
    for group in GROUPS:
        if group in settings.quality:
            yield Stage(group, _quality(group, settings))
    if settings.adult_words is not None:
        words = WordList(read_word_list(settings.adult_words))
        yield Stage(
            "adult", lambda text: Verdict(text, "adult" if words.count(text) > settings.adult_limit else "")
        )
    if index is not None:
        overlap = settings.evaluation_overlap
        yield Stage(
            "evaluation", lambda text: Verdict(text, "evaluation" if index.overlap(text) > overlap else "")
        )
    if settings.scrub_pii:
        yield Stage("pii", lambda text: Verdict(scrub(text)))


def _repair() -> Callable[[str], Verdict]:
    import ftfy

    # Encoding errors, control characters and lone surrogates; quotation marks, ligatures and full-width
    # forms are what the author wrote.
    config = ftfy.TextFixerConfig(
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization="NFC",
        explain=False,
    )

    def apply(text: str) -> Verdict:
        fixed = ftfy.fix_text(text, config)
        return Verdict(fixed, "" if fixed.strip() else "unicode.empty")

    return apply


def _length(text: str, settings: CleanSettings) -> Verdict:
    if settings.min_characters is not None and len(text) < settings.min_characters:
        return Verdict(text, "length.min_characters")
    if settings.max_characters is not None and len(text) > settings.max_characters:
        return Verdict(text, "length.max_characters")
    return Verdict(text)


def _language(settings: CleanSettings) -> Callable[[str], Verdict]:
    from spikescale.data_pipeline.clean.language import identify, known_languages

    known = known_languages()
    for language in settings.languages:
        if language not in known:
            raise UserError(f"language {language!r}: must be one of {', '.join(known)}")

    def apply(text: str) -> Verdict:
        language, score = identify(text)
        if language not in settings.languages:
            return Verdict(text, "language.other", language)
        return Verdict(text, "" if score >= settings.language_score else "language.unsure", language)

    return apply


def _quality(group: str, settings: CleanSettings) -> Callable[[str], Verdict]:
    limits = settings.limits
    if group == "c4":
        return lambda text: Verdict(*c4(text, limits))
    measures = {
        "gopher": gopher_measures,
        "gopher-repetition": repetition_measures,
        "fineweb": fineweb_measures,
    }[group]
    return lambda text: Verdict(text, first_broken(measures(text), limits))
