"""The report: one page that needs nothing else, says the numbers, and trusts no document."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.clean import CleanSettings
from spikescale.data_pipeline.clean.report import write_report
from spikescale.data_pipeline.manifest import Manifest
from spikescale.data_pipeline.prepare import PrepareSettings, prepare
from spikescale.data_pipeline.sources import open_source
from spikescale.errors import UserError

HOSTILE = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(2)>",
    "\u202egnp.exe \x1b[31m \u0000 &lt;b&gt; \" onload='x' $\\frac{1}{0}$",
)


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("report")
    path = base / "<b>$x$.jsonl"
    texts = [f"A document with the number {number} and some more words in it." for number in range(40)]
    texts += [*HOSTILE, *texts[:10], texts[0]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = base / "words.txt"
    words.write_text("script\nexe\n")
    clean = CleanSettings(adult_words=str(words), duplicates="exact", languages=("en",), min_characters=10)
    settings = PrepareSettings(ray=False, quiet=True, clean=clean)
    prepare(open_source([str(path)], partition_bytes=path.stat().st_size // 3), base / "data", settings)
    return base / "data"


def manifest_of(folder: Path) -> Manifest:
    from spikescale.data_pipeline.manifest import load_manifest

    return load_manifest(folder)


def test_the_page_needs_nothing_else_and_no_document_gets_out_of_its_place(
    folder: Path, tmp_path: Path
) -> None:
    written = write_report(manifest_of(folder), tmp_path / "page.html")
    content = written[0].read_text(encoding="utf-8")
    page = Page(content)
    assert {tag for tag, _ in page.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "thead", "tbody"),
        *("tr", "th", "td", "code", "details", "summary", "pre", "div", "bdi", "img"),
    }
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes) and "href" not in attributes
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
    assert "default-src 'none'" in content
    # Told as text: the tags of the first, the controls of the second.
    assert HOSTILE[0] in page.text
    assert "\\u202egnp.exe \\u001b[31m \\u0000 &lt;b&gt; \" onload='x' $\\frac{1}{0}$" in page.text
    assert "\u202e" not in content and "\x1b" not in content
    assert "<b>$x$.jsonl, line " in page.text


def test_the_pictures_beside_the_page_are_those_inside(folder: Path, tmp_path: Path) -> None:
    page, *pictures = write_report(manifest_of(folder), tmp_path / "sub" / "page.html")
    inlined = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text())
    names = ["flow", "drops", "lengths", "languages", "clusters", "tokens"]
    assert [path.name for path in pictures] == [f"page-{name}.png" for name in names]
    assert [base64.b64decode(content) for content in inlined] == [path.read_bytes() for path in pictures]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    again = write_report(manifest_of(folder), tmp_path / "again" / "page.html")
    assert again[0].read_bytes() == page.read_bytes()


def test_the_page_says_what_came_in_and_what_each_rule_dropped(folder: Path, tmp_path: Path) -> None:
    text = Page(write_report(manifest_of(folder), tmp_path / "page.html")[0].read_text()).text
    records = [json.loads(path.read_text()) for path in sorted((folder / "clean").glob("record-*.json"))]
    dropped: dict[str, int] = {}
    for record in records:
        for stage in record["stages"]:
            for rule, counts in stage["dropped"].items():
                dropped[rule] = dropped.get(rule, 0) + counts["documents"]
    assert dropped["duplicates.exact"] == 11 and sum(dropped.values()) == 13
    left = 53 - sum(dropped.values())
    assert "53 documents with " in text and f"; {left} ({100 * left / 53:.2f}%) with " in text
    for rule, count in dropped.items():
        assert re.search(rf"{re.escape(rule)}[^%]*?{count}{100 * count / 53:.2f}%", text), rule
    assert "Groups of equal or similar documents: 10." in text


def test_data_without_cleaning_have_a_report_that_says_so(prepared: Manifest, tmp_path: Path) -> None:
    written = write_report(prepared, tmp_path / "page.html")
    text = Page(written[0].read_text()).text
    assert "prepared without cleaning" in text and "data set " + prepared.sha256[:12] in text
    assert [path.name for path in written] == ["page.html", "page-tokens.png"]


def test_bad_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(60))
    path.write_text(good + '{"text": \n' + '{"other": "<i>"}\n')
    settings = PrepareSettings(
        ray=False,
        quiet=True,
        bad_records="quarantine",
        max_bad_share=0.1,
        clean=CleanSettings(min_characters=7),
    )
    source = open_source([str(path)], bad_records="quarantine")
    manifest = prepare(source, tmp_path / "out", settings)
    text = Page(write_report(manifest, tmp_path / "page.html")[0].read_text()).text
    assert "2 of 62 records (3.23%) could not be read" in text
    assert "json1" in text and "schema1" in text and "quarantine-00000.jsonl2" in text
    assert "60 documents with " in text and "; 50 (83.33%) with " in text


def test_a_damaged_record_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "clean" / "record-00001.json"
    path.write_text(path.read_text().replace('"documents_in": ', '"documents_in": 1'))
    with pytest.raises(
        UserError, match=r"record-00001.json: missing or damaged; run the same `data prepare`"
    ):
        write_report(manifest_of(copy), tmp_path / "page.html")


def test_the_commands_clean_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"The text with the number {number} is one of many that have words." for number in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts]))
    prepare_words = ["data", "prepare", "--source", str(path), "--output", str(tmp_path / "out"), "--no-ray"]
    cleaning = ["--quality", "gopher", "--quality-rule", "gopher.min_words=8", "--dedup", "exact", "--quiet"]
    assert main([*prepare_words, *cleaning]) == 0
    assert main(["data", "report", str(tmp_path / "out")]) == 0
    assert "report.html, with 5 pictures beside it" in capsys.readouterr().out
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "120 documents" in text and "similar documents: 60." in text
    assert main([*prepare_words, "--quality", "gofer"]) == 2
    assert "quality 'gofer': must be one of" in capsys.readouterr().err
