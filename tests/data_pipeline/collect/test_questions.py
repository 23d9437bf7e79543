"""Question-answer pairs: sections, the rules, the language models behind a fake server, what is dropped."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from spikescale.cli.main import main
from spikescale.data_pipeline.questions.extractive import GAP, extract
from spikescale.data_pipeline.questions.make import QuestionSettings, obstacle
from spikescale.data_pipeline.questions.providers import (
    MalformedReplyError,
    Pair,
    make_provider,
    parse_pairs,
)
from spikescale.data_pipeline.questions.sections import sections
from spikescale.data_pipeline.tokenizers import make_tokenizer
from spikescale.errors import UserError

KEY = "sk-secret-0123456789"
ARTICLE = """Photon

A photon is an elementary particle that carries light. It was named by Gilbert Lewis in 1926.

== History ==
In most theories up to the 18th century, light was pictured as being made of particles. In 1905 Albert
Einstein explained the photoelectric effect by quanta.

== Use ==
The laser is a device that emits light through optical amplification. Photons are counted by detectors.
Quantum optics studies them, and 2 of them may be entangled.
"""

PHOTON = {"text": ARTICLE, "title": "Photon", "category": "physics", "page_id": 7}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    path = tmp_path / "articles.jsonl"
    lines = [
        {
            "text": ARTICLE,
            "title": "Photon",
            "category": "physics",
            "page_id": 7,
            "url": "https://x.org/Photon",
        },
        {"text": "Short.", "title": "Short", "category": "art", "page_id": 8},
        PHOTON,
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_sections_are_the_text_in_about_equal_parts() -> None:
    chooser = random.Random(3)
    for _ in range(60):
        parts = [
            chooser.choice(["A sentence of it. ", "More\n\n", "word ", "x" * 30 + "! "]) for _ in range(60)
        ]
        text = "".join(parts)
        for count in (1, 2, 5):
            cut = sections(text, count)
            assert "".join(section.text for section in cut) == text and len(cut) == count
            assert all(text[section.start :].startswith(section.text) for section in cut)
            assert max(len(section.text) for section in cut) < 2 * len(text) / count + 40
    prose = "One fact is here. " * 100
    assert all(section.text.endswith("here. ") for section in sections(prose, 5))
    paragraphs = ("A fact. " * 10 + "\n\n") * 10
    assert all(section.text.endswith("\n\n") for section in sections(paragraphs, 5))
    assert [section.text for section in sections("x" * 50, 5)] == ["x" * 50]
    assert sections(" \n ", 5) == []


def test_the_rules_make_definitions_and_gaps() -> None:
    pairs = extract("Photon", ARTICLE, 10)
    assert ("What is a photon?", "an elementary particle") in pairs
    assert ("What is the laser?", "a device") in pairs
    assert (f"Photon: It was named by Gilbert Lewis in {GAP}.", "1926") in pairs
    assert all(answer in ARTICLE and answer not in question for question, answer in pairs)
    assert len(pairs) == len({question for question, _ in pairs})
    assert extract("Photon", ARTICLE, 2) == pairs[:2]
    long = "Word and word " * 20 + "in 1789 " + "and again " * 20 + "here."
    ((question, answer),) = extract("T", long, 1)
    assert answer == "1789" and len(question) <= 128 and question.count("...") == 2
    assert extract("T", "It is a thing of no name.", 3) == []
    # Without a title nothing stands before the gap; Mr. and an initial end no sentence.
    assert extract("", "In that year Mr. J. Smith built 14 bridges over it.", 3) == [
        (f"In that year Mr. J. Smith built {GAP} bridges over it.", "14")
    ]
    assert extract("T" * 100, long, 1)[0][1] == "1789"


def test_pairs_that_are_not_wanted_are_named() -> None:
    settings = QuestionSettings(longest_question=30, longest_answer=10)
    section = "The atom was split in 1938 by Hahn and Straßmann in the laboratory."
    for pair, problem in (
        (Pair("When was the atom split?", "1938"), ""),
        (Pair("When was the atom split?", "1939"), "answer not in the text"),
        (Pair("When was the atom split?", "The Atom"), "answer not in the text"),
        (Pair("", "1938"), "empty"),
        (Pair("When?", ""), "empty"),
        (Pair("Was it in 1938?", "1938"), "answer in the question"),
        (Pair("When " * 7, "1938"), "question too long"),
        (Pair("Where?", "the laboratory"), "answer too long"),
    ):
        assert obstacle(pair, section, settings, None) == problem
    characters = make_tokenizer("char", characters="TheatomwsplibyHnd1938 ?W")
    assert obstacle(Pair("Who split the atom?", "Hahn"), section, settings, characters) == ""
    assert obstacle(Pair("Who split it?", "Straßmann"), section, settings, characters) == "unknown tokens"
    assert obstacle(Pair("Whő?", "Hahn"), section, settings, characters) == "unknown tokens"
    tokens = make_tokenizer("byte")
    assert obstacle(Pair("Who?", "Straßmann"), section, settings, tokens) == ""  # ten bytes


def test_the_extractive_baseline_keeps_ids_and_offsets(
    articles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["data", "questions", "--input", str(articles), "--output", str(folder), "--quiet"]) == 0
    found = records(folder)
    assert len(found) >= 5
    for record in found:
        assert ARTICLE[record["answer_start"] :].startswith(record["answer"])
        assert record["article_id"] == "7" and record["category"] == "physics" and record["title"] == "Photon"
        assert record["text"] == f"Question: {record['question']}\nAnswer: {record['answer']}\n"
        assert record["id"].startswith(f"7-{record['section_id']}-") and record["provider"] == "extractive"
        assert record["url"] == "https://x.org/Photon"
    assert len({record["section_id"] for record in found}) >= 4
    assert len({record["id"] for record in found}) == len(found)
    out = capsys.readouterr().out
    assert "articles: 2\n" in out and "dropped: article again: 1" in out
    assert f"pairs: {len(found)}" in out
    before = (folder / "pairs.jsonl").read_bytes()
    assert main(["data", "questions", "--input", str(articles), "--output", str(folder), "--quiet"]) == 0
    assert (folder / "pairs.jsonl").read_bytes() == before


def anthropic(reply: str) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": reply}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 10, "output_tokens": 10},
    }


def openai(reply: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c_1", "object": "chat.completion", "model": "m", "choices": [choice]}


PATHS = {"anthropic": "/v1/messages", "openai": "/v1/chat/completions"}
REPLY = json.dumps(
    [
        {"question": "What carries light?", "answer": "A photon"},
        {"question": "What carries light?", "answer": "A photon"},
        {"question": "Who invented it?", "answer": "Isaac Newton"},
    ]
)


@pytest.mark.parametrize("kind", ["anthropic", "openai"])
def test_a_language_model_is_asked_once_a_section_and_not_believed(
    kind: str, serve: Any, articles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    shape = {"anthropic": anthropic, "openai": openai}[kind]
    busy = {"status": 429, "headers": {"Retry-After": "0"}, "body": {"error": {"type": "rate_limit_error"}}}
    answers = [
        busy,
        {"status": 529, "headers": {"Retry-After": "0"}, "body": {"error": {"type": "overloaded_error"}}},
        {"body": shape(f"Here you are:\n```json\n{REPLY}\n```")},
        {"body": shape("I would rather not.")},
        {"body": {"unexpected": True}},
        # A refusal that shows the key, which must not reach the terminal.
        {"status": 401, "body": {"error": {"message": f"invalid key {KEY}"}}},
        {"body": shape("[]")},
    ]
    server = serve([{"path": PATHS[kind], "answers": answers}])
    monkeypatch.setenv({"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}[kind], KEY)
    folder = tmp_path / "out"
    command = ["data", "questions", "--input", str(articles), "--output", str(folder), "--provider", kind]
    command += ["--model", "some-model", "--base-url", server.url, "--requests-per-second", "1000"]
    command += ["--temperature", "0"]
    assert main(command) == 2
    shown = capfd.readouterr()
    assert "HTTP 401" in shown.err and "[key]" in shown.err
    assert len(server.asked) == 6  # the first section three times, then one each
    assert main(command) == 0  # goes on with the fourth section, without asking about the others
    shown_after = capfd.readouterr()
    out = shown_after.out
    assert "articles: 2\n" in out and "sections: 6\n" in out and "pairs: 1\n" in out
    for reason, count in (("answer not in the text", 1), ("question again", 1), ("malformed reply", 2)):
        assert f"dropped: {reason}: {count}\n" in out
    (record,) = records(folder)
    assert (record["question"], record["answer"]) == ("What carries light?", "A photon")
    assert record["answer_start"] == ARTICLE.index("A photon") and record["provider"] == "some-model"
    assert len(server.asked) == 9
    for (_, body), headers in zip(server.asked, server.headers, strict=True):
        assert body["model"] == "some-model" and body["temperature"] == 0
        if kind == "anthropic":
            assert headers["x-api-key"] == KEY and headers["anthropic-version"] == "2023-06-01"
            assert "JSON array" in body["system"] and "Article: " in body["messages"][0]["content"]
        else:
            assert headers["Authorization"] == f"Bearer {KEY}"
            assert [message["role"] for message in body["messages"]] == ["system", "user"]
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert KEY.encode() not in written
    assert KEY not in shown.out + shown.err + shown_after.out + shown_after.err


def test_a_key_goes_nowhere_else(serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from spikescale.data_pipeline.collect.http import Manners

    manners = Manners(requests_per_second=1000)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="put the key into the environment variable OPENAI_API_KEY"):
        make_provider("openai", "m", None, manners)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match="must begin with https://"):
        make_provider("openai", "m", "http://example.org", manners)
    with pytest.raises(UserError, match="say which --model"):
        make_provider("openai", None, None, manners)
    with pytest.raises(UserError, match="takes no --model"):
        make_provider("extractive", "m", None, manners)
    other = serve([{"path": PATHS["openai"], "answers": [{"body": openai(REPLY)}]}])
    away = {"status": 307, "headers": {"Location": other.url + PATHS["openai"]}}
    server = serve([{"path": PATHS["openai"], "answers": [away]}])
    # A password for this host in ~/.netrc would otherwise take the key's place.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    provider = make_provider("openai", "m", server.url, manners)
    with pytest.raises(UserError, match="HTTP 307"):
        provider.ask("T", "text", 1)
    assert other.asked == []
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(provider.identity())
    assert "temperature" not in server.asked[0][1]  # left to the provider


def test_replies_are_parsed_or_refused() -> None:
    assert parse_pairs(f"Sure! {REPLY} Bye.")[0] == Pair("What carries light?", "A photon")
    for reply in ("", "[", "no", '["a"]', '[{"question": "x"}]', '[{"question": 1, "answer": "x"}]', "[1]"):
        with pytest.raises(MalformedReplyError):
            parse_pairs(reply)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--sections", "0"], "sections = 0: must be at least 1"),
        (["--limit-articles", "0"], "limit_articles = 0"),
        (["--tokenizer", "char"], "--tokenizer char: is learnt from a corpus"),
        (["--provider", "anthropic"], "say which --model"),
    ],
)
def test_bad_options_are_one_line(
    more: list[str], expected: str, articles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "questions", "--input", str(articles), "--output", str(tmp_path / "o")]
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_the_limit_of_articles_and_another_request(articles: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out"
    command = ["data", "questions", "--input", str(articles), "--output", str(folder), "--quiet"]
    assert main([*command, "--limit-articles", "1"]) == 0
    assert "articles: 1\n" in capsys.readouterr().out
    assert main(command) == 2
    assert "another request (limit_articles differ)" in capsys.readouterr().err
