"""`spikescale data collect`: articles of Wikipedia, or another MediaWiki, as JSON lines."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

EXAMPLES = """examples:
  spikescale data collect --list-groups
  spikescale data collect --group physics --contact me@example.org --output data/wiki-physics
  spikescale data collect --group all --contact https://example.org/me --output data/wiki
  spikescale data collect --category 'Particle physics' --contact me@example.org --output data/particles
  spikescale data prepare --source data/wiki/articles.jsonl --condition-on category --output data/prepared"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where articles.jsonl goes; begun again, it is continued",
    )
    add(
        "--contact",
        metavar="ADDRESS",
        help="your e-mail or web address, for the User-Agent that the wiki wants",
    )
    add("--list-groups", action="store_true", help="show the groups and exit")
    what = parser.add_argument_group("what (one kind)")
    what.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME",
        help="a ready list, or all of them; may be given again (default: none)",
    )
    what.add_argument(
        "--groups-file", type=Path, metavar="YAML", help="lists of your own, as docs/collecting.md describes"
    )
    what.add_argument(
        "--category",
        action="append",
        default=[],
        metavar="NAME",
        help="pages of a category, the most viewed first; may be given again (default: none)",
    )
    what.add_argument("--titles", type=Path, metavar="FILE", help="a text file with a title on each line")
    what.add_argument(
        "--top",
        action="append",
        default=[],
        metavar="YYYY-MM",
        help="the most viewed pages of a month; may be given again (default: none)",
    )
    choice = parser.add_argument_group("choice")
    choice.add_argument(
        "--count", type=int, metavar="N", help="articles of each group (default: the list's, 100)"
    )
    choice.add_argument(
        "--depth", type=int, default=0, metavar="N", help="levels of sub-categories that --category takes in"
    )
    choice.add_argument(
        "--months",
        metavar="FIRST:LAST",
        help="rank by the views from one month to another, YYYY-MM:YYYY-MM (default: the last twelve)",
    )
    choice.add_argument(
        "--min-characters", type=int, default=500, metavar="N", help="pass over shorter articles"
    )
    server = parser.add_argument_group("server")
    server.add_argument("--language", default="en", metavar="CODE", help="of Wikipedia")
    server.add_argument(
        "--api-url", metavar="URL", help="api.php of another MediaWiki (default: Wikipedia's)"
    )
    server.add_argument("--pageviews-url", metavar="URL", help="another pageview API (default: Wikimedia's)")
    server.add_argument(
        "--requests-per-second", type=float, default=2.0, metavar="R", help="at most; one request at a time"
    )
    server.add_argument(
        "--max-attempts", type=int, default=8, metavar="N", help="of a request, before the collection stops"
    )
    add("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Collect, and print a line for each group."""
    from spikescale.data_pipeline.collect.collection import ARTICLES, CollectSettings, collect
    from spikescale.data_pipeline.collect.http import Client, Manners
    from spikescale.data_pipeline.collect.wikipedia import PAGEVIEWS, Wikipedia

    groups = _groups(arguments)
    if arguments.list_groups:
        for name, group in groups.items():
            print(f"{name:<12} {group.count:>4}  {group.summary}")
        return 0
    for option in ("output", "contact"):
        if getattr(arguments, option) is None:
            raise UserError(f"--{option} is missing")
    if arguments.min_characters < 0:
        raise UserError(f"--min-characters {arguments.min_characters}: must not be negative")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", arguments.language):
        raise UserError(f"--language {arguments.language}: write the code in Wikipedia's address, such as en")
    manners = Manners(requests_per_second=arguments.requests_per_second, max_attempts=arguments.max_attempts)
    client = Client({"User-Agent": user_agent(arguments.contact)}, manners)
    project = f"{arguments.language}.wikipedia"
    api_url = arguments.api_url or f"https://{project}.org/w/api.php"
    settings = CollectSettings(
        groups=groups,
        project=project,
        api_url=api_url,
        months=_months(arguments.months),
        min_characters=arguments.min_characters,
    )
    wiki = Wikipedia(client, api_url, project, arguments.pageviews_url or PAGEVIEWS)

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    reports = collect(wiki, settings, arguments.output, say)
    for name, report in reports.items():
        passed = ", ".join(f"{count} {reason}" for reason, count in sorted(report.passed.items()))
        print(
            f"{name}: {report.kept} of {report.wanted} articles, {report.characters:,} characters"
            + (f"; passed over: {passed}" if passed else "")
        )
    retried = ", ".join(f"{count} x {reason}" for reason, count in sorted(client.retries.items()))
    print(
        f"{arguments.output / ARTICLES}: complete, {client.requests} requests this time"
        + (f", sent again: {retried}" if retried else "")
    )
    return 0


def user_agent(contact: str) -> str:
    """The User-Agent of Wikimedia's policy: program, version, contact. Raises UserError without a contact."""
    from spikescale import __version__

    if not re.fullmatch(r"[^\s()@]+@[^\s()@]+\.[^\s()@]+|https?://[^\s()]+", contact):
        raise UserError(f"--contact {contact!r}: must be an e-mail address or a web address")
    return f"spikescale/{__version__} ({contact}) python-requests"


def _groups(arguments: argparse.Namespace) -> dict[str, Any]:
    from spikescale.data_pipeline.collect.collection import check_month
    from spikescale.data_pipeline.collect.groups import Group, read_groups, ready_groups

    known = ready_groups() if arguments.groups_file is None else read_groups(arguments.groups_file)
    kinds = [f"--{kind}" for kind in ("group", "category", "titles", "top") if getattr(arguments, kind)]
    if arguments.list_groups:
        return known
    if len(kinds) != 1:
        given = " and ".join(kinds) or "nothing"
        raise UserError(
            f"what to collect: give one of --group, --category, --titles, --top; {given} was given"
        )
    if arguments.count is not None and arguments.count < 1:
        raise UserError(f"--count {arguments.count}: must be at least 1")
    if not 0 <= arguments.depth <= 5:
        raise UserError(f"--depth {arguments.depth}: must be from 0 to 5")
    changes = {} if arguments.count is None else {"count": arguments.count}
    if arguments.group:
        names = list(known) if arguments.group == ["all"] else list(dict.fromkeys(arguments.group))
        for name in names:
            if name not in known:
                raise UserError(f"--group {name}: must be all or one of {', '.join(known)}")
        return {name: known[name].model_copy(update=changes) for name in names}
    if arguments.category:
        group = Group(categories=arguments.category, depth=arguments.depth, rank_by="views", **changes)
        return {arguments.category[0]: group}
    if arguments.top:
        return {"top": Group(top=[check_month(month) for month in arguments.top], **changes)}
    try:
        lines = arguments.titles.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--titles {arguments.titles}: cannot be read ({error})") from None
    titles = [line.strip() for line in lines if line.strip()]
    if not titles:
        raise UserError(f"--titles {arguments.titles}: holds no titles")
    return {arguments.titles.stem: Group(titles=titles, **{"count": len(titles), **changes})}


def _months(text: str | None) -> tuple[str, str] | None:
    from spikescale.data_pipeline.collect.collection import check_month

    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or check_month(first) > check_month(last):
        raise UserError(f"--months {text}: write FIRST:LAST, such as 2024-01:2024-12")
    return first, last
