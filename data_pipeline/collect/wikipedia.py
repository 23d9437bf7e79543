"""A client of the MediaWiki action API and of Wikimedia's pageview API.

As documented at mediawiki.org (API:Etiquette, Manual:Maxlag parameter, API:Continue, API:Categorymembers,
Extension:TextExtracts) and wikimedia.org/api/rest_v1: requests come one after another with a User-Agent that
names a contact, `maxlag=5` lets them wait while the databases are behind, and plain text of a whole
page is given for one page a request.
"""

import calendar
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from spikescale.data_pipeline.collect.http import Client, RefusedError
from spikescale.errors import UserError

MAXLAG = 5  # seconds that database replicas may lag behind before requests wait
BUSY = ("maxlag", "ratelimited", "readonly")
PAGEVIEWS = "https://wikimedia.org/api/rest_v1/metrics/pageviews"


@dataclass(frozen=True)
class Page:
    """An article, or the reason why there is none.

    Attributes:
        problem: `missing`, `invalid` (title), `not an article` (of another namespace), `disambiguation`, or
            empty for an article, which has all of the rest.
        title: after redirects.
        page_id, revision: numbers of the page and of the version that the text is of.
        timestamp: when that version was saved (ISO 8601, UTC).
        url: of that version, which shows its authors.
        text: plain, with headings as in `== History ==`.
    """

    problem: str = ""
    title: str = ""
    page_id: int = 0
    revision: int = 0
    timestamp: str = ""
    url: str = ""
    text: str = ""


class Wikipedia:
    """One wiki.

    Args:
        client: whose headers name a contact.
        api_url: of api.php.
        project: as the pageview API calls it, `en.wikipedia`.
        pageviews_url: of the pageview API.
    """

    def __init__(self, client: Client, api_url: str, project: str, pageviews_url: str = PAGEVIEWS) -> None:
        self._client = client
        self._api_url = api_url
        self._project = project
        self._pageviews_url = pageviews_url.rstrip("/")

    def licence(self) -> dict[str, str]:
        """`text` and `url` of the licence that the wiki gives for its content."""
        answer = self._query({"meta": "siteinfo", "siprop": "rightsinfo"})
        rights = answer["query"]["rightsinfo"]
        return {"text": str(rights["text"]), "url": str(rights["url"])}

    def category_members(self, category: str, after: Mapping[str, str] | None) -> dict[str, Any]:
        """A batch of a category: its `pages` and `categories`, and `after` for the next batch, or None."""
        answer = self._query(
            {
                "list": "categorymembers",
                "cmtitle": f"Category:{category}",
                "cmprop": "title|type",
                "cmtype": "page|subcat",
                "cmnamespace": "0|14",
                "cmlimit": "max",
                **(after or {"continue": ""}),
            }
        )
        members = answer["query"]["categorymembers"]
        return {
            "pages": [member["title"] for member in members if member["ns"] == 0],
            "categories": [member["title"].partition(":")[2] for member in members if member["ns"] == 14],
            "after": answer.get("continue"),
        }

    def page(self, title: str) -> Page:
        """The article of that title, redirects followed."""
        wanted = {
            "titles": title,
            "redirects": "1",
            "prop": "extracts|info|revisions|pageprops",
            "explaintext": "1",
            "exsectionformat": "wiki",
            "exlimit": "1",
            "inprop": "url",
            "rvprop": "ids|timestamp",
            "ppprop": "disambiguation",
        }
        page: dict[str, Any] = {}
        after: dict[str, str] | None = {"continue": ""}
        while after is not None:
            answer = self._query({**wanted, **after})
            for part in answer["query"].get("pages", []):
                page.update(part)
            after = answer.get("continue")
        if not page or page.get("invalid"):
            return Page("invalid", title)
        if page.get("missing"):
            return Page("missing", page["title"])
        if page["ns"] != 0:
            return Page("not an article", page["title"])
        if "disambiguation" in page.get("pageprops", {}):
            return Page("disambiguation", page["title"])
        revision = page["revisions"][0]
        return Page(
            title=page["title"],
            page_id=page["pageid"],
            revision=revision["revid"],
            timestamp=revision["timestamp"],
            url=_of_version(page["fullurl"], revision["revid"]),
            text=without_empty_sections(page.get("extract", "")),
        )

    def views(self, title: str, months: tuple[str, str]) -> int:
        """Views of a page by people from the first to the last of `months` (YYYY-MM), both included."""
        year, month = map(int, months[1].split("-"))
        # Only months that lie wholly within the range are counted.
        last_day = f"{year:04d}{month:02d}{calendar.monthrange(year, month)[1]:02d}"
        first_day = months[0].replace("-", "") + "01"
        path = f"per-article/{self._project}/all-access/user/{_in_path(title)}/monthly/{first_day}/{last_day}"
        try:
            answer = self._client.get(f"{self._pageviews_url}/{path}")
        except RefusedError as refusal:
            if refusal.status == 404:  # documented: no view was counted
                return 0
            raise
        return sum(item["views"] for item in answer["items"])

    def top(self, month: str) -> list[str]:
        """The (up to 1000) most viewed pages of a month (YYYY-MM), whatever they are about."""
        year, _, number = month.partition("-")
        path = f"top/{self._project}/all-access/{year}/{number}/all-days"
        answer = self._client.get(f"{self._pageviews_url}/{path}")
        articles = answer["items"][0]["articles"]
        return [entry["article"].replace("_", " ") for entry in articles]

    def _query(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        common = {"action": "query", "format": "json", "formatversion": "2", "maxlag": str(MAXLAG)}
        answer = self._client.get(self._api_url, {**common, **parameters}, busy=_busy)
        if not isinstance(answer, dict) or "error" in answer:
            error = answer.get("error", {}) if isinstance(answer, dict) else {}
            words = f"{error.get('code', 'unknown answer')}: {error.get('info', answer)}"
            raise UserError(f"{self._api_url}: {' '.join(words.split())[:300]}")
        answer.setdefault("query", {})
        return dict(answer)


def _busy(answer: Any) -> str | None:
    code = answer.get("error", {}).get("code", "") if isinstance(answer, dict) else ""
    return code if code in BUSY or code.startswith("internal_api_error") else None


def _in_path(title: str) -> str:
    return quote(title.replace(" ", "_"), safe="")


def _of_version(url: str, revision: int) -> str:
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, urlencode({"oldid": revision})]))
    return urlunsplit(parts._replace(query=query))


def without_empty_sections(text: str) -> str:
    """The text without headings that nothing follows (what tables and references leave behind)."""
    kept: list[str] = []  # from the end
    level_below = 0  # of the heading below that was kept, with nothing between; 7: there is text; 0: nothing
    for line in reversed(text.split("\n")):
        heading = re.fullmatch(r"(={2,6}) .+ \1", line)
        if heading is None:
            if line.strip():
                level_below = 7
            kept.append(line)
            continue
        level = len(heading[1])
        if level_below <= level:
            continue
        kept.append(line)
        level_below = level
    return re.sub(r"\n{3,}", "\n\n", "\n".join(reversed(kept))).strip()
