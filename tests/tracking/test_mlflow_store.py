"""Probing a store, telling errors that pass from those that stay, showing an address."""

import http.server
import sqlite3
import threading

import pytest

from spikescale.tracking.mlflow_store import is_server, may_pass, probe, shown


class FailureError(Exception):
    def __init__(self, code):
        super().__init__(code)
        self.error_code = code


@pytest.mark.parametrize("code", ["TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"])
@pytest.mark.parametrize("uri", ["http://there", "sqlite:////there.db"])
def test_busy_stores_may_pass(code, uri):
    assert may_pass(FailureError(code), uri)


@pytest.mark.parametrize("code", ["RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "PERMISSION_DENIED"])
def test_refusals_do_not_pass(code):
    assert not may_pass(FailureError(code), "http://there")


def test_an_internal_error_may_pass_at_a_server_and_not_in_a_file():
    assert may_pass(FailureError("INTERNAL_ERROR"), "https://there")
    assert not may_pass(FailureError("INTERNAL_ERROR"), "sqlite:////there.db")


def test_a_locked_database_and_lost_connections_may_pass_and_mistakes_do_not():
    assert may_pass(sqlite3.OperationalError("database is locked"), "sqlite:///x")
    assert may_pass(ConnectionRefusedError(), "sqlite:///x")
    assert not may_pass(ModuleNotFoundError("No module named 'boto3'"), "http://there")
    assert not may_pass(sqlite3.DatabaseError("file is not a database"), "sqlite:///x")
    wrapped = FailureError("INTERNAL_ERROR")
    wrapped.__cause__ = sqlite3.OperationalError("database is locked")
    assert may_pass(wrapped, "sqlite:///x")


@pytest.fixture
def answering():
    """Address of a server that answers every request with the status a test puts in the list."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/base/health"
            self.send_response(status[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/base/", status
        server.shutdown()


def test_a_server_answers_unless_it_says_that_it_cannot(answering):
    address, status = answering
    for fine in (200, 401, 404):
        status[0] = fine
        probe(address)
    for down in (429, 500, 503):
        status[0] = down
        with pytest.raises(ConnectionError, match=str(down)):
            probe(address)


def test_a_closed_port_is_a_connection_error():
    with pytest.raises(ConnectionError, match="refused"):
        probe("http://127.0.0.1:9")
    with pytest.raises(ConnectionError):
        probe("postgresql+psycopg2://user:secret@127.0.0.1:9/mlflow")


def test_a_database_file_is_opened(tmp_path):
    probe(f"sqlite:///{tmp_path}/new/mlflow.db")
    (tmp_path / "text").write_text("not a database at all, " * 100)
    with pytest.raises(sqlite3.DatabaseError):
        probe(f"sqlite:///{tmp_path}/text")
    with pytest.raises(OSError, match=r"text"):
        probe(f"sqlite:///{tmp_path}/text/mlflow.db")


def test_a_password_is_not_shown():
    assert shown("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert shown("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"
    assert is_server("https://host")
    assert not is_server("sqlite:////data/mlflow.db")
