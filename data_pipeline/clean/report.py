"""`spikescale data report`: one HTML page, with its pictures inside and beside it.

Documents are text of strangers: everything that comes from them is escaped, their control characters
are shown as such, their writing direction is kept to themselves, and the page may load nothing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.clean import plots
from spikescale.data_pipeline.clean.rules import RULES
from spikescale.data_pipeline.clean.summary import CleaningTotals, cleaning_totals
from spikescale.data_pipeline.inspect import draw_document_lengths
from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.quarantine import SUMMARY as QUARANTINE
from spikescale.files import read_json
from spikescale.pages import Pictures, image, table, text, write_page

MOST_FILES = 50  # of bad records, that are named


def write_report(manifest: Manifest, path: Path) -> list[Path]:
    """Write the page about prepared data to `path`, pictures beside it, and return all the paths.

    Raises UserError when a record of the cleaning is missing or damaged.
    """
    totals = cleaning_totals(manifest)
    pictures = Pictures(path)
    sections = [_overview(manifest), *_bad_records(manifest.folder)]
    if totals is None:
        sections.append(
            '<h2 id="cleaning">Cleaning</h2><p>These data were prepared without cleaning: every document '
            "that was read went into a split as it was.</p>"
        )
    else:
        sections += _cleaning(totals, pictures)
    if any(manifest.splits.values()):
        lengths = pictures.path("tokens")
        draw_document_lengths(manifest, lengths)
        pictures.written.append(lengths)
        sections.append("<h2>Tokens of a document</h2>" + image(lengths.read_bytes(), "tokens of a document"))
    title = f"Data report: {text(manifest.source)}"
    write_page(path, title, sections)
    return [path, *pictures.written]


def _overview(manifest: Manifest) -> str:
    rows = []
    for split in manifest.splits:
        totals = manifest.totals(split)
        rows.append((split, totals.documents, totals.characters, totals.bytes, totals.tokens))
    tokenizer = manifest.tokenizer
    facts = (
        f"<p>Source {text(manifest.source)}, {manifest.partitions:,} partitions, tokenizer "
        f"{text(tokenizer.kind)} with {tokenizer.vocab_size:,} ids, data set "
        f"<code>{text(manifest.sha256[:12])}</code>.</p>"
    )
    return facts + table(("split", "documents", "characters", "bytes", "tokens"), rows)


def _bad_records(folder: Path) -> list[str]:
    path = folder / QUARANTINE
    if not path.exists():
        return []
    content = read_json(path)
    said = (
        f"<h2>Bad records</h2><p>{content['bad']:,} of {content['records']:,} records "
        f"({_share(content['bad'], content['records'])}) could not be read and were put in quarantine.</p>"
    )
    rows = list(content["kinds"].items())
    files = [(name, lines) for name, lines in content["files"].items()][:MOST_FILES]
    return [
        said
        + (table(("kind", "records"), rows) if rows else "")
        + (table(("file", "entries"), files) if files else "")
    ]


def _cleaning(totals: CleaningTotals, pictures: Pictures) -> Iterable[str]:
    first, last = totals.stages[0], totals.stages[-1]
    yield (
        '<h2 id="cleaning">What came in and what is left</h2>'
        f"<p>{first.documents_in:,} documents with {first.characters_in:,} characters were read; "
        f"{last.documents_out:,} ({_share(last.documents_out, first.documents_in)}) with "
        f"{last.characters_out:,} characters ({_share(last.characters_out, first.characters_in)}) "
        "are left.</p>"
        + pictures.show("flow", "what is left after each stage", plots.draw_flow(totals))
        + table(
            (
                "stage",
                "documents in",
                "changed",
                "dropped",
                "documents out",
                "characters in",
                "characters out",
            ),
            [
                (
                    stage.name,
                    stage.documents_in,
                    stage.changed,
                    sum(counts[0] for counts in stage.dropped.values()),
                    stage.documents_out,
                    stage.characters_in,
                    stage.characters_out,
                )
                for stage in totals.stages
            ],
        )
    )
    used = {name: value for name, value in totals.settings.items() if value not in (None, [], {}, False)}
    yield f"<details><summary>settings</summary><pre>{text(json.dumps(used, indent=2))}</pre></details>"
    yield "<h2>What each rule dropped</h2>" + _drops(totals, pictures)
    lengths = pictures.show("lengths", "lengths before and after", plots.draw_lengths(totals.lengths))
    yield f"<h2>Characters of a document, before and after</h2>{lengths}"
    if totals.languages:
        languages = pictures.show("languages", "languages", plots.draw_languages(totals.languages))
        yield f"<h2>Languages</h2><p>Of the documents that reached this stage.</p>{languages}"
    if totals.clusters is not None:
        yield "<h2>Groups of duplicates</h2>" + _clusters(totals.clusters, pictures)
    yield "<h2>Samples of what was dropped</h2>" + _samples(totals)


def _drops(totals: CleaningTotals, pictures: Pictures) -> str:
    read = totals.stages[0]
    rows: list[Sequence[Any]] = []
    for stage in totals.stages:
        for rule, (documents, characters) in sorted(stage.dropped.items()):
            limit = _limit(rule, totals.settings)
            share = _share(documents, read.documents_in)
            rows.append((rule, limit, documents, share, characters, _share(characters, read.characters_in)))
    if not rows:
        return "<p>Nothing was dropped.</p>"
    shown = f"<p>The picture shows the {plots.MOST_BARS} that dropped most.</p>"
    heads = ("rule", "limit", "documents", "of those read", "characters", "of those read")
    picture = pictures.show("drops", "dropped by each rule", plots.draw_drops(totals))
    return (shown if len(rows) > plots.MOST_BARS else "") + picture + table(heads, rows)


def _limit(rule: str, settings: dict[str, Any]) -> str:
    stage, _, name = rule.partition(".")
    if stage == "length":
        return f"{settings[name]:,} characters"
    if rule == "language.unsure":
        return f"probability at least {settings['language_score']:g}"
    if rule == "duplicates.near":
        return f"similarity at least {settings['near_similarity']:g}"
    if rule == "unknown.share":
        return f"share of unknown tokens: at most {settings['max_unknown_share']:g}"
    if rule == "adult":
        return f"occurrences: at most {settings['adult_limit']}"
    if rule == "evaluation":
        return f"share of {settings['evaluation_ngram']}-grams: at most {settings['evaluation_overlap']:g}"
    if rule not in RULES:
        return ""
    limit = settings["rules"].get(rule, RULES[rule].limit)
    sign = {"min": "at least ", "max": "at most ", "flag": ""}[RULES[rule].kind]
    return f"{RULES[rule].meaning}: {sign}{limit:g}" if sign else RULES[rule].meaning


def _clusters(clusters: dict[str, Any], pictures: Pictures) -> str:
    if not clusters["clusters"]:
        return "<p>No document equals or resembles another.</p>"
    rows = [
        (f"document {entry['document']} of partition {entry['partition']}", entry["size"])
        for entry in clusters["largest"]
    ]
    return (
        f"<p>Groups of equal or similar documents: {clusters['clusters']:,}. "
        "Of each one document was kept.</p>"
        + pictures.show("clusters", "sizes of groups of duplicates", plots.draw_clusters(clusters))
        + table(("kept", "documents in the group"), rows)
    )


def _samples(totals: CleaningTotals) -> str:
    parts = []
    for rule, entries in totals.samples.items():
        parts.append(f"<h3>{text(rule)}</h3>")
        for entry in entries:
            note = f"; {text(entry['note'])}" if entry["note"] else ""
            place = f'<div class="place"><bdi>{text(entry["place"])}</bdi>{note}</div>'
            parts.append(f'{place}<pre dir="auto">{text(entry["text"])}</pre>')
    chosen = "<p class='note'>Of each rule those with the smallest hashes, cut to 600 characters.</p>"
    return chosen + "".join(parts) if parts else "<p>Nothing was dropped.</p>"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"
