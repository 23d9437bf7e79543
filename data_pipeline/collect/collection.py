"""Collecting: groups of articles into one file of JSON lines, each request made once whatever happens.

    candidates (titles, categories, most viewed) -> ranked by views -> pages -> articles.jsonl

Every answer that was used is a step of the journal, so a killed collection, begun again, asks only for
what is missing, and ends with the file that an undisturbed one gives for the same answers.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from spikescale.data_pipeline.collect.groups import Group
from spikescale.data_pipeline.collect.journal import Journal, earlier_request, open_journal
from spikescale.data_pipeline.collect.wikipedia import Wikipedia
from spikescale.errors import UserError
from spikescale.files import write_json

ARTICLES = "articles.jsonl"
SUMMARY = "summary.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class CollectSettings:
    """What is collected.

    Attributes:
        groups: by name, in the order in which they choose; an article goes to the first that wants it.
        project: the wiki, as the pageview API calls it; `source` of every document.
        api_url: of its api.php.
        months: first and last (YYYY-MM) by whose views articles are ranked; None: the twelve
            complete ones before the collection was begun.
        min_characters: shorter articles are passed over.
    """

    groups: Mapping[str, Group]
    project: str
    api_url: str
    months: tuple[str, str] | None = None
    min_characters: int = 500


@dataclass
class GroupReport:
    """How a group went: articles kept, titles passed over by reason, and categories without pages."""

    wanted: int
    kept: int = 0
    candidates: int = 0
    characters: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)


def collect(
    wiki: Wikipedia, settings: CollectSettings, folder: Path, say: Say = lambda line: None
) -> dict[str, GroupReport]:
    """Collect into `folder` and report on each group; finished when it returns.

    Raises UserError when the server refuses or does not answer any more; what is there by then is kept.
    """
    folder = Path(folder)
    months = settings.months or _months_of(folder) or last_year(date.today())
    request = {
        "groups": {name: group.model_dump() for name, group in settings.groups.items()},
        "project": settings.project,
        "api_url": settings.api_url,
        "months": list(months),
        "min_characters": settings.min_characters,
    }
    with open_journal(folder, ARTICLES, request) as journal:
        if len(journal):
            say(f"{folder}: going on after {len(journal)} steps")
        licence = journal.once("licence", wiki.licence)
        reports = {}
        taken: dict[int, str] = {}
        for name, group in settings.groups.items():
            report = GroupReport(wanted=group.count)
            reports[name] = report
            titles = _ranked(wiki, journal, group, months, report, name, say)
            for title in titles:
                if report.kept == group.count:
                    break
                key = f"page {title}"
                if key not in journal:
                    _fetch(wiki, journal, key, title, name, settings, licence, taken)
                outcome = journal.result(key)
                problem = outcome["problem"]
                if not problem and outcome["group"] != name:
                    problem = f"in {outcome['group']} already"
                if problem:
                    report.passed[problem] += 1
                    continue
                taken[outcome["page_id"]] = name
                report.kept += 1
                report.characters += outcome["characters"]
                if report.kept % 25 == 0:
                    say(f"{name}: {report.kept} of {group.count} articles")
            if report.kept < group.count:
                say(f"{name}: only {report.kept} of {group.count} articles: there are no more candidates")
    digest = hashlib.sha256((folder / ARTICLES).read_bytes()).hexdigest()
    write_json(
        folder / SUMMARY,
        {"sha256": digest, "groups": {name: vars(report) for name, report in reports.items()}},
    )
    return reports


def _fetch(
    wiki: Wikipedia,
    journal: Journal,
    key: str,
    title: str,
    group: str,
    settings: CollectSettings,
    licence: Mapping[str, str],
    taken: Mapping[int, str],
) -> None:
    page = wiki.page(title)
    problem = page.problem
    if not problem and page.page_id in taken:
        problem = f"in {taken[page.page_id]} already"
    if not problem and len(page.text) < settings.min_characters:
        problem = "too short"
    if problem:
        journal.add(key, {"problem": problem})
        return
    text = f"{page.title}\n\n{page.text}\n"
    record = {
        "text": text,
        "title": page.title,
        "category": group,
        "source": settings.project,
        "page_id": page.page_id,
        "revision": page.revision,
        "revision_time": page.timestamp,
        "url": page.url,
        "licence": licence["text"],
        "licence_url": licence["url"],
        "attribution": f'"{page.title}", by its contributors, {page.url}, {licence["text"]}',
    }
    found = {"problem": "", "group": group, "page_id": page.page_id, "characters": len(text)}
    journal.add(key, found, (record,))


def _ranked(
    wiki: Wikipedia,
    journal: Journal,
    group: Group,
    months: tuple[str, str],
    report: GroupReport,
    name: str,
    say: Say,
) -> list[str]:
    titles = list(dict.fromkeys(_candidates(wiki, journal, group, report)))
    if len(titles) > group.candidates:
        say(f"{name}: more than {group.candidates} candidates, the first {group.candidates} are looked at")
        titles = titles[: group.candidates]
    report.candidates = len(titles)
    for category in report.empty:
        say(f"{name}: category {category!r} has no pages")
    if group.rank_by == "order":
        return titles
    say(f"{name}: ranking {len(titles)} candidates by their views")
    period = "..".join(months)
    views = {
        title: journal.once(f"views {period} {title}", partial(wiki.views, title, months)) for title in titles
    }
    return sorted(titles, key=lambda title: (-views[title], title))


def _candidates(wiki: Wikipedia, journal: Journal, group: Group, report: GroupReport) -> Iterator[str]:
    """Titles, in an order that depends on the answers alone; may repeat. Stops soon after enough."""
    if group.titles:
        yield from group.titles
        return
    if group.top:
        for month in group.top:
            yield from journal.once(f"top {month}", partial(wiki.top, month))
        return
    waiting = [(category, 0) for category in group.categories]
    seen = set(group.categories)
    found: set[str] = set()
    for category, depth in waiting:  # grows while it is read: breadth first
        members = 0
        for batch in _batches(wiki, journal, category):
            members += len(batch["pages"]) + len(batch["categories"])
            yield from batch["pages"]
            found.update(batch["pages"])
            if len(found) > group.candidates:
                return
            if depth < group.depth:
                waiting += [(name, depth + 1) for name in batch["categories"] if name not in seen]
                seen.update(batch["categories"])
        if not members:
            report.empty.append(category)


def _batches(wiki: Wikipedia, journal: Journal, category: str) -> Iterator[dict[str, Any]]:
    after: dict[str, str] | None = None
    while True:
        place = "" if after is None else after.get("cmcontinue", str(after))
        batch = journal.once(
            f"members {category} {place}",
            partial(wiki.category_members, category, after),
        )
        yield batch
        after = batch["after"]
        if after is None:
            return


def last_year(today: date) -> tuple[str, str]:
    """The first and last of the twelve complete months before `today`."""
    months = [today.year * 12 + today.month - 1 - back for back in (12, 1)]
    return (
        f"{months[0] // 12:04d}-{months[0] % 12 + 1:02d}",
        f"{months[1] // 12:04d}-{months[1] % 12 + 1:02d}",
    )


def _months_of(folder: Path) -> tuple[str, str] | None:
    earlier = earlier_request(folder)
    return None if earlier is None else (earlier["months"][0], earlier["months"][1])


def check_month(text: str) -> str:
    """A month as YYYY-MM. Raises UserError for anything else, and for one before the API's data."""
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text) or text < "2015-07":
        raise UserError(f"month {text!r}: write YYYY-MM, from 2015-07 on (there are no views of before)")
    return text
