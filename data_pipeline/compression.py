"""How far tokenizers shorten a text that they have not seen."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spikescale.data_pipeline.placed import placed_documents
from spikescale.data_pipeline.sources import Source
from spikescale.data_pipeline.split import SplitSettings
from spikescale.data_pipeline.tasks import HashSample, SurveyTask
from spikescale.data_pipeline.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer, parse_spec
from spikescale.errors import UserError


@dataclass(frozen=True)
class Row:
    """One tokenizer on the held-out documents; `unknown` tokens among `tokens`, ends of documents not."""

    spec: str
    vocab_size: int
    tokens: int
    unknown: int
    documents: int
    characters: int
    bytes: int
    seconds: float


def measure(source: Source, specs: Sequence[str], split: SplitSettings, sample_characters: int) -> list[Row]:
    """Learn each tokenizer from the training split of `source` and encode all other documents with it.

    Raises UserError where there is nothing to learn from or to measure.
    """
    parsed = [parse_spec(spec) for spec in specs]
    partitions = source.partitions()
    held_out = [
        document
        for partition in partitions
        for document in placed_documents(partition, split)
        if document.split != "train"
    ]
    if not held_out:
        raise UserError("no documents are held out: use more text, or a larger share")
    texts = [document.text for document in held_out]
    rows = []
    for spec in parsed:
        tokenizer = _learn(source, spec, split, sample_characters)
        tokenizer.encode_arrays(texts[:1])  # what is built at first use is not measured
        began = time.perf_counter()
        encoded = tokenizer.encode_arrays(texts)
        seconds = time.perf_counter() - began
        unknown = 0
        if tokenizer.unk_id is not None:
            unknown = sum(int((ids == tokenizer.unk_id).sum()) for ids in encoded)
        rows.append(
            Row(
                spec=spec.text,
                vocab_size=tokenizer.vocab_size,
                tokens=sum(map(len, encoded)),
                unknown=unknown,
                documents=len(texts),
                characters=sum(map(len, texts)),
                bytes=sum(document.size_bytes for document in held_out),
                seconds=seconds,
            )
        )
    return rows


def _learn(source: Source, spec: TokenizerSpec, split: SplitSettings, budget: int) -> Tokenizer:
    if spec.learns_from is None:
        return make_tokenizer(spec)
    characters: set[str] = set()
    syllables: Counter[str] = Counter()
    sample = HashSample(budget)
    for partition in source.partitions():
        task = SurveyTask(partition, split, None, spec.learns_from, budget, spec.language)
        survey = task.run(lambda *counts: None)
        characters |= survey.characters
        syllables.update(survey.syllables)
        for key, text in survey.texts:
            sample.add(key, text)
    texts = [text for _, text in sample.items()]
    if not characters and not texts:
        raise UserError(f"tokenizer {spec.text}: the training split has no documents to learn from")
    return make_tokenizer(spec, characters=characters, texts=texts, syllables=syllables)
