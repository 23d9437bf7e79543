"""A server on the loopback interface that plays cassettes."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

CASSETTES = Path(__file__).parent / "cassettes"


class Player:
    """Plays a cassette's interactions and remembers what was asked.

    Attributes:
        asked: (path, parameters or body) of every request, in order.
        headers: of the same requests.
        watch: called with each of them before it is answered.
    """

    def __init__(self, interactions: list[dict[str, Any]]) -> None:
        self.interactions = interactions
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.watch: Callable[[str, dict[str, Any]], None] = lambda path, parameters: None
        self.url = ""
        self._played = [0] * len(interactions)

    def answer(self, path: str, parameters: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        self.asked.append((path, parameters))
        self.headers.append(headers)
        self.watch(path, parameters)
        for number, interaction in enumerate(self.interactions):
            wanted = interaction.get("parameters", {})
            if interaction["path"] == path and wanted.items() <= parameters.items():
                answers = interaction["answers"]
                turn = min(self._played[number], len(answers) - 1)
                self._played[number] += 1
                return dict(answers[turn])
        return {"status": 418, "text": f"not on the cassette: {path} {parameters}"}

    def titles(self) -> list[str]:
        """The pages that were asked for."""
        return [parameters["titles"] for _, parameters in self.asked if "titles" in parameters]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[dict[str, Any]]], Player]]:
    """Start a server for a list of interactions."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[ThreadingHTTPServer] = []

    def start(interactions: list[dict[str, Any]]) -> Player:
        player = Player(interactions)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                self._play(parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._play(self.path, body)

            def _play(self, path: str, parameters: dict[str, Any]) -> None:
                answer = player.answer(path, parameters, dict(self.headers))
                if answer.get("drop"):
                    self.close_connection = True
                    return
                content = answer.get("text", "").encode()
                if "body" in answer:
                    content = json.dumps(answer["body"]).encode()
                self.send_response(answer.get("status", 200))
                for name, value in answer.get("headers", {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        player.url = f"http://127.0.0.1:{server.server_address[1]}"
        return player

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def wikipedia_server(serve: Callable[[list[dict[str, Any]]], Player]) -> Player:
    """The cassette of a small Wikipedia."""
    content = json.loads((CASSETTES / "wikipedia.json").read_text(encoding="utf-8"))
    return serve(content["interactions"])
