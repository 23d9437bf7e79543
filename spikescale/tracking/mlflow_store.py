"""What is known of MLflow's stores: whether one answers, which errors pass, how to show the address."""

import contextlib
import http.client
import logging
import os
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

PROBE_SECONDS = 3.0
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PASSING_CODES = (
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "ABORTED",
)
PASSING_TYPES = ("OperationalError", "InterfaceError", "DisconnectionError")  # SQLAlchemy's and sqlite3's


def default_store(output: Path) -> str:
    """The local store used when no other is set: a SQLite file in the folder of all runs."""
    return f"sqlite:///{output.resolve()}/mlflow.db"


def is_server(uri: str) -> bool:
    """Whether the store is an MLflow server rather than a database or a folder."""
    return uri.startswith(("http://", "https://"))


def shown(uri: str) -> str:
    """The address without the password that it may hold."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def open_client(uri: str) -> Any:
    """An MlflowClient for the store, one that fails quickly and quietly. Takes seconds (imports MLflow)."""
    # MLflow's own seven tries with growing waits would hide for minutes that a server is down, and hold
    # up the end of a run; the delivery thread tries again itself. A user's own setting stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow.tracking import MlflowClient

    # Set after the import, which sets up MLflow's loggers. What these would say is said once, by Delivery.
    for name, level in (
        ("alembic", logging.WARNING),
        ("mlflow", logging.WARNING),
        ("mlflow.store.db.utils", logging.CRITICAL),
        ("urllib3.connectionpool", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)
    return MlflowClient(tracking_uri=uri)


def probe(uri: str) -> None:
    """Ask whether the store answers, for at most about 3 s; raises what is wrong.

    A server is asked for /health, a database server for a connection, a SQLite file for its version.
    MLflow's own client would try all of them again for minutes before it gives up.
    """
    parts = urlsplit(uri)
    if is_server(uri):
        _probe_server(shown(uri))
    elif parts.scheme.partition("+")[0] == "sqlite":
        _probe_sqlite(uri)
    elif (port := PORTS.get(parts.scheme.partition("+")[0])) and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), PROBE_SECONDS).close()


def _probe_server(address: str) -> None:
    try:
        with urllib.request.urlopen(address.rstrip("/") + "/health", timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        # Any other answer (no such page, not allowed) is still one.
        if error.code >= 500 or error.code == 429:
            raise ConnectionError(f"HTTP {error.code}") from error
    except urllib.error.URLError as error:
        # A certificate that only MLflow is told to trust still proves that somebody answers.
        if not isinstance(error.reason, ssl.SSLError):
            raise ConnectionError(str(error.reason)) from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _probe_sqlite(uri: str) -> None:
    name = uri.partition(":///")[2].partition("?")[0]
    if name:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(name, timeout=PROBE_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")


def may_pass(error: BaseException, uri: str) -> bool:
    """Whether a later try may succeed: no connection, a server's failure, a locked database, a full disk."""
    code = getattr(error, "error_code", None)
    # A server's client reports every lost connection and every 5xx without a known body under this code.
    if code in PASSING_CODES or (code == "INTERNAL_ERROR" and is_server(uri)):
        return True
    if code is not None and code != "INTERNAL_ERROR":
        return False
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) or type(seen).__name__ in PASSING_TYPES:
            return True
        seen = seen.__cause__
    return False
