"""Who asks the questions: a provider is given a section and returns pairs.

`extractive` makes them by rules, here; `anthropic` and `openai` ask a language model over HTTP. Nobody is
believed: `make` drops every pair whose answer is not in the text.
"""

import json
import os
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from spikescale.data_pipeline.collect.http import Client, Manners
from spikescale.data_pipeline.questions.extractive import extract
from spikescale.errors import UserError

ADDRESSES = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com"}
KEYS = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
NAMES = ("extractive", *ADDRESSES)
ANTHROPIC_VERSION = "2023-06-01"
ANSWER_TOKENS = 2048

TASK = """You write reading questions with short answers. You are given one section of an article.
Write {count} questions that the section answers. Each must make sense to a reader who has not seen the
section, so name what it is about. Each answer must be copied from the section letter by letter: a name, a
number, or a phrase of at most fifteen words, without anything added. Reply with a JSON array and nothing
else: [{{"question": "...", "answer": "..."}}]"""


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class MalformedReplyError(Exception):
    """The provider replied with something that is no list of pairs."""


class Provider(Protocol):
    """Asks questions about a section."""

    client: Client | None

    def identity(self) -> dict[str, Any]:
        """What its questions depend on, as plain JSON, and no secret."""
        ...

    def ask(self, title: str, section: str, count: int) -> list[Pair]:
        """Up to `count` pairs. Raises MalformedReplyError; UserError when there is no answer to be had."""
        ...


class Extractive:
    """Rules: definitions and gaps."""

    client: Client | None = None

    def identity(self) -> dict[str, Any]:
        """See Provider."""
        return {"provider": "extractive", "version": 1}

    def ask(self, title: str, section: str, count: int) -> list[Pair]:
        """See Provider."""
        return [Pair(question, answer) for question, answer in extract(title, section, count)]


class LanguageModel:
    """A model behind the Messages API of Anthropic or the Chat Completions API of OpenAI (and its kin).

    Args:
        kind: anthropic or openai.
        model: as the provider calls it.
        address: where the API is; None: the provider's own.
        manners: rate and patience.
        temperature: of the sampling; None: left to the provider (some models take no other).
    """

    def __init__(
        self, kind: str, model: str, address: str | None, manners: Manners, temperature: float | None = None
    ) -> None:
        self._kind, self._model, self._temperature = kind, model, temperature
        self._address = (address or ADDRESSES[kind]).rstrip("/")
        parts = urlsplit(self._address)
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise UserError(
                f"--base-url {address}: must begin with https://, or the key would travel readable"
            )
        key = os.environ.get(KEYS[kind], "").strip()
        if not key:
            raise UserError(f"--provider {kind}: put the key into the environment variable {KEYS[kind]}")
        if kind == "anthropic":
            headers = {"x-api-key": key, "anthropic-version": ANTHROPIC_VERSION}
        else:
            headers = {"Authorization": f"Bearer {key}"}
        self.client: Client | None = Client(headers, manners, secrets=[key])
        self._post = self.client.post

    def identity(self) -> dict[str, Any]:
        """See Provider."""
        return {
            "provider": self._kind,
            "address": self._address,
            "model": self._model,
            "temperature": self._temperature,
            "task": TASK,
        }

    def ask(self, title: str, section: str, count: int) -> list[Pair]:
        """See Provider."""
        task = TASK.format(count=count)
        section = f"Article: {title}\n\n{section}" if title else section
        common: dict[str, Any] = {"model": self._model}
        if self._temperature is not None:
            common["temperature"] = self._temperature
        if self._kind == "anthropic":
            messages = [{"role": "user", "content": section}]
            body = {**common, "max_tokens": ANSWER_TOKENS, "system": task, "messages": messages}
            reply = self._post(f"{self._address}/v1/messages", body)
            return parse_pairs(_text(lambda: "".join(part.get("text", "") for part in reply["content"])))
        messages = [{"role": "system", "content": task}, {"role": "user", "content": section}]
        reply = self._post(f"{self._address}/v1/chat/completions", {**common, "messages": messages})
        return parse_pairs(_text(lambda: reply["choices"][0]["message"]["content"]))


def make_provider(
    name: str,
    model: str | None,
    address: str | None,
    manners: Manners,
    temperature: float | None = None,
) -> Provider:
    """The provider of that name. Raises UserError for what it lacks."""
    if name == "extractive":
        if model or address or temperature is not None:
            raise UserError("--provider extractive: takes no --model, --base-url or --temperature")
        return Extractive()
    if not model:
        raise UserError(f"--provider {name}: say which --model")
    return LanguageModel(name, model, address, manners, temperature)


def _text(part: Any) -> str:
    try:
        text = part()
    except (KeyError, IndexError, TypeError, AttributeError):
        raise MalformedReplyError("the reply has no text where the API puts it") from None
    if not isinstance(text, str):
        raise MalformedReplyError("the reply has no text where the API puts it")
    return text


def parse_pairs(reply: str) -> list[Pair]:
    """The pairs in a model's reply: the JSON array in it, whatever stands around that."""
    begin, end = reply.find("["), reply.rfind("]")
    try:
        entries: Any = json.loads(reply[begin : end + 1]) if 0 <= begin < end else None
        return [Pair(entry["question"].strip(), entry["answer"].strip()) for entry in entries]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        raise MalformedReplyError("no JSON array of questions and answers") from None
