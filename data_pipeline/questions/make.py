"""From articles to checked pairs: ask about each section once, keep what the text itself answers.

Every section is a step of a journal, so that a killed run goes on without asking (and paying) twice.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.collect.journal import Journal, open_journal
from spikescale.data_pipeline.questions.providers import MalformedReplyError, Pair, Provider
from spikescale.data_pipeline.questions.sections import Section, sections
from spikescale.data_pipeline.sources import Document
from spikescale.data_pipeline.sources.base import ReadOptions
from spikescale.data_pipeline.sources.files import LOCAL_FILES, FilesSource, expand_path
from spikescale.data_pipeline.sources.streams import FilePath, read_chunks
from spikescale.data_pipeline.tokenizers import Tokenizer
from spikescale.errors import UserError
from spikescale.files import sha256_text, write_json

PAIRS = "pairs.jsonl"
SUMMARY = "summary.json"
KEYS = ("title", "category", "page_id", "url", "source")

Say = Callable[[str], None]


@dataclass(frozen=True)
class QuestionSettings:
    """Which pairs are wanted.

    Attributes:
        sections: that an article is cut into. pairs: asked for of each.
        longest_question, longest_answer: tokens of the tokenizer, or characters without one.
        limit_articles: read the first so many; None: all.
    """

    sections: int = 5
    pairs: int = 3
    longest_question: int = 128
    longest_answer: int = 96
    limit_articles: int | None = None

    def __post_init__(self) -> None:
        for name in ("sections", "pairs", "longest_question", "longest_answer"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.limit_articles is not None and self.limit_articles < 1:
            raise UserError(f"limit_articles = {self.limit_articles}: must be at least 1")


def make_questions(
    inputs: Sequence[str],
    output: Path,
    provider: Provider,
    settings: QuestionSettings,
    tokenizer: Tokenizer | None = None,
    say: Say = lambda line: None,
) -> Counter[str]:
    """Write `pairs.jsonl` into `output` and return the counts: articles, sections, pairs, drops by reason.

    Raises UserError for malformed input, another request in the folder, and a provider that refuses.
    """
    files = [path for word in inputs for path, _ in expand_path(word, ReadOptions())]
    request = {
        "inputs": [_digest(path) for path in files],
        "sections": settings.sections,
        "pairs": settings.pairs,
        "longest": [settings.longest_question, settings.longest_answer],
        "limit_articles": settings.limit_articles,
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        **provider.identity(),
    }
    counts: Counter[str] = Counter()
    with open_journal(Path(output), PAIRS, request) as journal:
        if len(journal):
            say(f"{output}: going on after {len(journal)} sections")
        seen: set[str] = set()
        for article in _articles(inputs):
            if settings.limit_articles is not None and counts["articles"] == settings.limit_articles:
                break
            if article.fault:
                counts["dropped: faulty record"] += 1
                continue
            known = dict(article.metadata)
            identifier = known.get("page_id") or sha256_text(article.text)[:16]
            if identifier in seen:
                counts["dropped: article again"] += 1
                continue
            seen.add(identifier)
            counts["articles"] += 1
            _ask_about(article, identifier, known, journal, provider, settings, tokenizer, counts)
            if counts["articles"] % 25 == 0:
                say(f"{counts['articles']} articles, {counts['pairs']} pairs")
    write_json(Path(output) / SUMMARY, dict(counts))
    return counts


def _digest(path: FilePath) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _articles(inputs: Sequence[str]) -> Iterator[Document]:
    for partition in FilesSource(LOCAL_FILES, inputs, ReadOptions(metadata_keys=KEYS)).partitions():
        yield from partition.documents()


def _ask_about(
    article: Document,
    identifier: str,
    known: dict[str, str],
    journal: Journal,
    provider: Provider,
    settings: QuestionSettings,
    tokenizer: Tokenizer | None,
    counts: Counter[str],
) -> None:
    title = known.get("title", "")
    asked: set[str] = set()
    for section in sections(article.text, settings.sections):
        key = f"{identifier} {section.number}"
        if key not in journal:
            result, records = _ask(title, section, provider, settings, tokenizer, asked)
            common = {
                "category": known.get("category"),
                "article_id": identifier,
                "section_id": section.number,
                "title": title or None,
                "url": known.get("url"),
                "source": known.get("source"),
                "provider": provider.identity().get("model", provider.identity()["provider"]),
            }
            numbered = [
                {"id": f"{identifier}-{section.number}-{number}", **record, **common}
                for number, record in enumerate(records)
            ]
            journal.add(key, result, tuple(numbered))
        result = journal.result(key)
        asked.update(result["questions"])
        counts["sections"] += 1
        counts["pairs"] += len(result["questions"])
        for reason, count in result["dropped"].items():
            counts[f"dropped: {reason}"] += count


def _ask(
    title: str,
    section: Section,
    provider: Provider,
    settings: QuestionSettings,
    tokenizer: Tokenizer | None,
    asked: set[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    dropped: Counter[str] = Counter()
    records = []
    questions: list[str] = []
    try:
        pairs = provider.ask(title, section.text, settings.pairs)
    except MalformedReplyError:
        dropped["malformed reply"] += 1
        pairs = []
    for pair in pairs:
        problem = obstacle(pair, section.text, settings, tokenizer)
        if not problem and pair.question in asked.union(questions):
            problem = "question again"
        if problem:
            dropped[problem] += 1
            continue
        questions.append(pair.question)
        records.append(
            {
                "text": f"Question: {pair.question}\nAnswer: {pair.answer}\n",
                "question": pair.question,
                "answer": pair.answer,
                "answer_start": section.start + section.text.index(pair.answer),
            }
        )
    return {"questions": questions, "dropped": dict(dropped)}, records


def obstacle(pair: Pair, section: str, settings: QuestionSettings, tokenizer: Tokenizer | None) -> str:
    """Why a pair is dropped; empty for one that is kept."""
    if not pair.question or not pair.answer:
        return "empty"
    if pair.answer not in section:
        return "answer not in the text"
    if pair.answer in pair.question:
        return "answer in the question"
    if tokenizer is None:
        lengths = [len(pair.question), len(pair.answer)]
    else:
        encoded = tokenizer.encode_batch([pair.question, pair.answer])
        if any(tokenizer.unk_id in ids for ids in encoded):
            return "unknown tokens"
        lengths = [len(ids) for ids in encoded]
    if lengths[0] > settings.longest_question:
        return "question too long"
    if lengths[1] > settings.longest_answer:
        return "answer too long"
    return ""
