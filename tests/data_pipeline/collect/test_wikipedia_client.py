"""The client against recorded-like answers: every documented shape, and every way to be told to wait."""

from datetime import datetime, timezone
from typing import Any

import pytest

from spikescale.data_pipeline.collect.http import Client, Manners, RefusedError, retry_after
from spikescale.data_pipeline.collect.wikipedia import Page, Wikipedia, without_empty_sections
from spikescale.errors import UserError


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def client_of(time: Time, **manners: Any) -> Client:
    chosen = Manners(**{"requests_per_second": 1e6, "timeout": 20, **manners})
    return Client({"User-Agent": "t (a@b.c)"}, chosen, sleep=time.sleep, clock=time.clock)


def wiki_of(player: Any, time: Time | None = None, **manners: Any) -> Wikipedia:
    client = client_of(time or Time(), **manners)
    url = player.url
    return Wikipedia(client, f"{url}/w/api.php", "en.wikipedia", f"{url}/metrics/pageviews/")


def test_a_page_has_text_revision_and_the_address_of_that_version(wikipedia_server: Any) -> None:
    page = wiki_of(wikipedia_server).page("Energy")
    assert (page.problem, page.title, page.page_id, page.revision) == ("", "Energy", 9649, 1254)
    assert page.url == "https://en.wikipedia.org/wiki/Energy?oldid=1254"
    assert page.timestamp == "2024-11-01T08:09:10Z"
    assert page.text.startswith("Energy is what") and "\n\n== Forms ==\nEnergy" in page.text
    assert "Units" not in page.text and "References" not in page.text
    ((_, asked),) = wikipedia_server.asked
    expected = {"maxlag": "5", "formatversion": "2", "redirects": "1", "explaintext": "1", "exlimit": "1"}
    assert expected.items() <= asked.items()
    assert wikipedia_server.headers[0]["User-Agent"] == "t (a@b.c)"
    assert "gzip" in wikipedia_server.headers[0]["Accept-Encoding"]


@pytest.mark.parametrize(
    ("title", "problem"),
    [
        ("No such page", "missing"),
        ("Bad[title", "invalid"),
        ("Special:Search", "not an article"),
        ("Physics (disambiguation)", "disambiguation"),
    ],
)
def test_what_is_no_article_says_why(wikipedia_server: Any, title: str, problem: str) -> None:
    assert wiki_of(wikipedia_server).page(title) == Page(problem, title)


def test_redirects_end_at_the_page(wikipedia_server: Any) -> None:
    assert wiki_of(wikipedia_server).page("energies").title == "Energy"


def test_an_answer_in_parts_is_joined(wikipedia_server: Any) -> None:
    page = wiki_of(wikipedia_server).page("Naïve art")
    assert page.revision == 1400 and page.text.endswith("Naïve 你好.")
    assert wikipedia_server.titles() == ["Naïve art"] * 2
    assert wikipedia_server.asked[1][1]["continue"] == "||info"


def test_categories_come_in_batches(wikipedia_server: Any) -> None:
    wiki = wiki_of(wikipedia_server)
    first = wiki.category_members("Physics", None)
    assert first["pages"] == ["Energy", "Physics (disambiguation)", "Stub"] and first["categories"] == []
    second = wiki.category_members("Physics", first["after"])
    assert second == {"pages": ["Force"], "categories": ["Heat"], "after": None}


def test_views_are_summed_over_whole_months(wikipedia_server: Any) -> None:
    wiki = wiki_of(wikipedia_server)
    assert wiki.views("Force", ("2024-01", "2024-02")) == 9000
    assert wiki.views("Stub", ("2024-01", "2024-02")) == 0  # 404: none were counted
    assert wiki.top("2024-02") == ["Main Page", "Special:Search", "Energy"]
    with pytest.raises(RefusedError, match="HTTP 418"):
        wiki.views("Force", ("2023-01", "2023-02"))


def test_a_busy_server_is_waited_for_as_long_as_it_says(wikipedia_server: Any) -> None:
    time = Time()
    client = client_of(time)
    wiki = Wikipedia(client, f"{wikipedia_server.url}/w/api.php", "en.wikipedia")
    assert wiki.page("Busy").revision == 1500
    assert wikipedia_server.titles() == ["Busy"] * 7
    # 429 and maxlag name seconds; the third to sixth attempt back off by themselves.
    waits = [seconds for seconds in time.slept if seconds > 0.01]
    assert waits == [17, 5, 4, 8, 16, 32]
    assert dict(client.retries) == {
        "HTTP 429": 1,
        "maxlag": 1,
        "HTTP 503": 1,
        "ConnectionError": 1,
        "an answer that is not JSON": 1,
        "ratelimited": 1,
    }
    assert client.requests == 7


def test_patience_ends_in_one_line(wikipedia_server: Any) -> None:
    time = Time()
    with pytest.raises(UserError, match=r"HTTP 502, 3 times; what was done is kept: run the same command"):
        wiki_of(wikipedia_server, time, max_attempts=3).page("Always down")
    assert [seconds for seconds in time.slept if seconds > 0.01] == [1, 2]
    assert len(wikipedia_server.asked) == 3
    with pytest.raises(UserError, match="HTTP 429, and asks to wait 17 s"):
        wiki_of(wikipedia_server, longest_wait=1).page("Busy")


def test_final_refusals_are_not_repeated(wikipedia_server: Any) -> None:
    with pytest.raises(UserError, match=r"HTTP 403 .*respect our robot policy"):
        wiki_of(wikipedia_server).page("Forbidden")
    with pytest.raises(UserError, match="badtags: Something final"):
        wiki_of(wikipedia_server).page("Broken wiki")
    assert len(wikipedia_server.asked) == 2


def test_requests_keep_their_distance(wikipedia_server: Any) -> None:
    time = Time()
    wiki = wiki_of(wikipedia_server, time, requests_per_second=4)
    for title in ("Energy", "Force", "Heat"):
        wiki.page(title)
    assert time.slept == [0.25, 0.25]
    time.now += 100  # a pause does not save up requests
    wiki.page("Energy")
    wiki.page("Force")
    assert time.slept == [0.25, 0.25, 0.25]


def test_nobody_answers() -> None:
    time = Time()
    with pytest.raises(UserError, match="ConnectionError, 2 times"):
        client_of(time, max_attempts=2).get("http://127.0.0.1:9/")


def test_retry_after_is_a_number_or_a_date() -> None:
    now = datetime(2024, 11, 1, 10, 0, tzinfo=timezone.utc)
    assert retry_after("120") == 120
    assert retry_after("Fri, 01 Nov 2024 10:01:30 GMT", now) == 90
    assert retry_after("Fri, 01 Nov 2024 09:00:00 GMT", now) == 0
    assert retry_after(None) is None and retry_after("soon") is None


def test_headings_without_text_go() -> None:
    parts = ["Intro", "== A ==", "=== A1 ===\nx", "=== A2 ===", "== B ==", "== C ==\ny == z ==", "== D =="]
    text = "\n\n\n".join(parts)
    assert without_empty_sections(text) == "Intro\n\n== A ==\n\n=== A1 ===\nx\n\n== C ==\ny == z =="
    assert without_empty_sections("") == ""
    assert without_empty_sections("== Only ==") == ""
