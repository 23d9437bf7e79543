"""Collections: what they choose, what they write, and that a kill loses and repeats nothing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from spikescale.cli.data_collect import user_agent
from spikescale.cli.main import main
from spikescale.data_pipeline.collect.collection import last_year
from spikescale.data_pipeline.collect.groups import Group, read_groups, ready_groups
from spikescale.data_pipeline.collect.journal import open_journal
from spikescale.errors import UserError

START = "import sys; from spikescale.cli.main import main; sys.exit(main(sys.argv[1:]))"
GROUPS = """
heat:
  summary: physics by views
  count: 2
  categories: [Physics, Nothing here]
  depth: 1
  candidates: 10
  rank_by: views
listed:
  count: 9
  titles: [No such page, energies, Energy, Naïve art, Stub, "Bad[title"]
"""


def words(player: Any, folder: Path, *more: str) -> list[str]:
    groups = folder.parent / "groups.yaml"
    groups.write_text(GROUPS, encoding="utf-8")
    return [
        *("data", "collect", "--groups-file", str(groups), "--group", "all"),
        *("--api-url", f"{player.url}/w/api.php", "--pageviews-url", f"{player.url}/metrics/pageviews"),
        *("--months", "2024-01:2024-02", "--contact", "me@example.org", "--requests-per-second", "10000"),
        *("--output", str(folder), *more),
    ]


def articles(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "articles.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_groups_are_ranked_filtered_and_written(
    wikipedia_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(words(wikipedia_server, folder)) == 0
    captured = capsys.readouterr()
    found = articles(folder)
    # By views: Force 9000, the disambiguation 8000, Heat 7000, Energy 5000; two were wanted.
    assert [(record["category"], record["title"]) for record in found] == [
        ("heat", "Force"),
        ("heat", "Heat"),
        ("listed", "Energy"),
        ("listed", "Naïve art"),
    ]
    assert found[0] == {
        "text": found[0]["text"],
        "title": "Force",
        "category": "heat",
        "source": "en.wikipedia",
        "page_id": 10902,
        "revision": 1301,
        "revision_time": "2024-11-01T08:09:10Z",
        "url": "https://en.wikipedia.org/wiki/Force?oldid=1301",
        "licence": "Creative Commons Attribution-Share Alike 4.0",
        "licence_url": "https://creativecommons.org/licenses/by-sa/4.0/",
        "attribution": '"Force", by its contributors, https://en.wikipedia.org/wiki/Force?oldid=1301, '
        "Creative Commons Attribution-Share Alike 4.0",
    }
    assert found[0]["text"].startswith("Force\n\nEnergy is what") and found[0]["text"].endswith("Force.\n")
    assert "heat: 2 of 2 articles" in captured.out and "passed over: 1 disambiguation" in captured.out
    assert "listed: 2 of 9 articles" in captured.out
    assert "passed over: 1 in listed already, 1 invalid, 1 missing, 1 too short" in captured.out
    assert "heat: category 'Nothing here' has no pages" in captured.err
    assert "listed: only 2 of 9 articles" in captured.err
    # "Too deep" lies below the depth asked for; Physics, met again below Heat, was not read again.
    asked = [parameters["cmtitle"] for _, parameters in wikipedia_server.asked if "cmtitle" in parameters]
    assert asked == ["Category:Physics", "Category:Physics", "Category:Nothing here", "Category:Heat"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sha256"] == hashlib.sha256((folder / "articles.jsonl").read_bytes()).hexdigest()
    assert summary["groups"]["heat"]["kept"] == 2 and summary["groups"]["listed"]["passed"]["missing"] == 1
    assert "spikescale/" in wikipedia_server.headers[0]["User-Agent"]
    assert "(me@example.org)" in wikipedia_server.headers[0]["User-Agent"]


def test_a_finished_collection_asks_for_nothing(wikipedia_server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(words(wikipedia_server, folder, "--quiet")) == 0
    before = (folder / "articles.jsonl").read_bytes()
    count = len(wikipedia_server.asked)
    assert main(words(wikipedia_server, folder, "--quiet")) == 0
    assert len(wikipedia_server.asked) == count
    assert (folder / "articles.jsonl").read_bytes() == before


def test_prepare_reads_what_was_collected(wikipedia_server: Any, tmp_path: Path) -> None:
    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.data_pipeline.tokenizers import load_tokenizer
    from spikescale.data_pipeline.tokenizers.conditioned import ConditionedTokenizer

    folder = tmp_path / "out"
    assert main(words(wikipedia_server, folder, "--quiet")) == 0
    chosen = ["--valid-fraction", "0", "--test-fraction", "0", "--condition-on", "category,source"]
    prepare = ["data", "prepare", "--source", str(folder), "--output", str(tmp_path / "data"), "--no-ray"]
    assert main([*prepare, "--quiet", *chosen]) == 0
    manifest = load_manifest(tmp_path / "data")
    assert manifest.totals("train").documents == 4  # the folder's other files are no documents
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    assert isinstance(tokenizer, ConditionedTokenizer)
    assert tokenizer.values == {"category": ("heat", "listed"), "source": ("en.wikipedia",)}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_collection_goes_on_and_fetches_nothing_twice(wikipedia_server: Any, tmp_path: Path) -> None:
    """Killed by the server at every fourth request, in the middle of it."""
    undisturbed = tmp_path / "undisturbed"
    assert main(words(wikipedia_server, undisturbed, "--quiet")) == 0
    expected = [described(*asked) for asked in wikipedia_server.asked]
    wikipedia_server.asked.clear()
    running: list[subprocess.Popen[bytes]] = []
    interrupted: list[str] = []
    answered = 0

    def watch(path: str, parameters: dict[str, Any]) -> None:
        nonlocal answered
        answered += 1
        if answered % 4 == 0:
            interrupted.append(described(path, parameters))
            running[-1].send_signal(signal.SIGKILL)
            running[-1].wait()

    wikipedia_server.watch = watch
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", START, *words(wikipedia_server, folder, "--quiet")]
    code = -1
    for _ in range(30):
        running.append(subprocess.Popen(command, env={**os.environ, "NO_PROXY": "127.0.0.1"}))
        code = running[-1].wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and len(interrupted) >= 4
    assert (folder / "articles.jsonl").read_bytes() == (undisturbed / "articles.jsonl").read_bytes()
    assert (folder / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()
    # Only what was in flight when the kill came was asked for again.
    asked = Counter(described(*one) for one in wikipedia_server.asked)
    assert asked == Counter(expected) + Counter(interrupted)


def described(path: str, parameters: dict[str, Any]) -> str:
    return json.dumps([path, parameters], sort_keys=True)


def test_a_journal_survives_a_cut_at_any_byte(tmp_path: Path) -> None:
    """A kill leaves a prefix of what was being written; finished steps before it stay."""
    whole = tmp_path / "whole"
    with open_journal(whole, "records.jsonl", {"what": 1}) as journal:
        journal.add("a", {"n": 1})
        journal.add("b", {"n": 2}, ({"text": "one é"},))
        ends = [(whole / name).stat().st_size for name in ("journal.log", "records.jsonl")]
        journal.add("c", {"n": 3}, ({"text": "two"}, {"text": "three"}))
    log, records = ((whole / name).read_bytes() for name in ("journal.log", "records.jsonl"))
    other = tmp_path / "other"
    with open_journal(other, "records.jsonl", {"what": 1}) as journal:
        journal.add("a", {"n": 1})
        journal.add("b", {"n": 2}, ({"text": "one é"},))
        journal.add("d", 0, ({"t": 1},))
    other_log, other_records = ((other / name).read_bytes() for name in ("journal.log", "records.jsonl"))
    states = [(log[: ends[0]], records[:cut]) for cut in range(ends[1], len(records) + 1)]
    states += [(log[:cut], records) for cut in range(ends[0], len(log))]
    for number, (torn_log, torn_records) in enumerate(states):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "request.json").write_bytes((whole / "request.json").read_bytes())
        (folder / "journal.log").write_bytes(torn_log)
        (folder / "records.jsonl").write_bytes(torn_records)
        with open_journal(folder, "records.jsonl", {"what": 1}) as journal:
            assert "b" in journal and "c" not in journal and journal.result("b") == {"n": 2}
            journal.add("d", 0, ({"t": 1},))  # shorter than what was torn: nothing of it may stay
        assert (folder / "journal.log").read_bytes() == other_log
        assert (folder / "records.jsonl").read_bytes() == other_records


def test_what_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with open_journal(folder, "records.jsonl", {"what": 1}) as journal:
        journal.add("a", 1, ({"text": "one"},))
        journal.add("b", 2)
        with (
            pytest.raises(UserError, match="another process writes there"),
            open_journal(folder, "records.jsonl", {"what": 1}),
        ):
            pass
    with (
        pytest.raises(UserError, match=r"begun with another request \(what differ\)"),
        open_journal(folder, "records.jsonl", {"what": 2}),
    ):
        pass
    records = folder / "records.jsonl"
    content = records.read_bytes()
    records.write_bytes(content.replace(b"one", b"two"))
    with (
        pytest.raises(UserError, match=r"records.jsonl: differs from what was written, after byte 0"),
        open_journal(folder, "records.jsonl", {"what": 1}),
    ):
        pass
    records.write_bytes(content)
    log = folder / "journal.log"
    log.write_bytes(log.read_bytes().replace(b'"a"', b'"z"'))
    with (
        pytest.raises(UserError, match=r"journal.log, line 1: was changed"),
        open_journal(folder, "records.jsonl", {"what": 1}),
    ):
        pass
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with (
        pytest.raises(UserError, match=r"is not empty and holds no request\.json"),
        open_journal(foreign, "records.jsonl", {}),
    ):
        pass


def test_the_ten_groups_of_the_plan_are_there() -> None:
    groups = ready_groups()
    assert set(groups) == {
        *("persons", "biology", "physics", "history", "chemistry"),
        *("mathematics", "geography", "books", "philosophy", "papers"),
    }
    for name, group in groups.items():
        assert group.count == 100 and group.summary
        listed = group.titles or group.categories
        assert len(set(listed)) == len(listed)
        assert all(entry == entry.strip() and "_" not in entry and "|" not in entry for entry in listed)
        if group.titles:
            assert len(group.titles) >= 100 and group.rank_by == "order", name
        else:
            assert group.rank_by == "views" and len(group.categories) >= 10, name


def test_the_months_of_the_last_year() -> None:
    assert last_year(date(2024, 11, 26)) == ("2023-11", "2024-10")
    assert last_year(date(2024, 1, 1)) == ("2023-01", "2023-12")


def test_most_viewed_pages_of_a_month(wikipedia_server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    chosen = words(wikipedia_server, folder, "--quiet", "--min-characters", "100")
    del chosen[2:6]
    assert main([*chosen, "--top", "2024-02"]) == 0
    assert [record["title"] for record in articles(folder)] == ["Energy"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--group", "nothing"], "--group nothing: must be all or one of biology, books"),
        ([], "give one of --group, --category, --titles, --top; nothing was given"),
        (["--group", "physics", "--top", "2024-01"], "--group and --top was given"),
        (["--top", "2024-13"], "month '2024-13': write YYYY-MM"),
        (["--top", "2014-01"], "from 2015-07 on"),
        (["--group", "physics", "--months", "2024-05"], "write FIRST:LAST"),
        (["--group", "physics", "--contact", "nobody"], "--contact 'nobody': must be an e-mail address"),
        (["--group", "physics", "--count", "0"], "--count 0: must be at least 1"),
        (["--category", "X", "--depth", "9"], "--depth 9: must be from 0 to 5"),
        (["--titles", "/nowhere"], "--titles /nowhere: cannot be read"),
        (["--group", "physics", "--requests-per-second", "0"], "requests_per_second = 0.0: must be positive"),
        (["--group", "physics", "--language", "e.n"], "--language e.n: write the code"),
    ],
)
def test_bad_words_are_one_line(
    more: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["data", "collect", "--output", str(tmp_path / "o"), "--contact", "a@b.org"]
    assert main([*common, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "o").exists()


def test_groups_of_ones_own_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    for content, expected in (
        ("a: {titles: [x], categories: [y]}", "g.yaml: a: .*give exactly one of titles, categories, top"),
        ("a: {titel: [x]}", "g.yaml: a.titel: unknown key; allowed: summary, count"),
        ("- a", "must map names of groups"),
        ("a: [", "not valid YAML"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=expected):
            read_groups(path)
    with pytest.raises(ValueError, match="exactly one"):
        Group()
    assert user_agent("https://example.org/me").endswith("(https://example.org/me) python-requests")
