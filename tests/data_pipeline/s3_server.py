"""An S3 server on loopback, and a proxy in front of it that fails as it is told."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of a fresh moto server, which runs as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_PORT": str(port)},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


class Proxy:
    """Passes requests on. `plan` is asked for each: it returns what goes wrong with it, or None.

    `(500 or 503)` answers so, `"cut"` ends the connection in the middle of the body that comes back,
    `"flip"` changes one byte of it, `"flip-upload"` one byte of the body that goes.
    """

    def __init__(self, address: str) -> None:
        self.plan: Any = lambda method, path, headers: None
        self.log: list[tuple[str, str, str]] = []  # method, path, range
        self.done: list[Any] = []  # what went wrong
        self._target = address.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *words: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *words: None  # type: ignore[method-assign]
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """One request."""
        body = self._body(request)
        fault = self.plan(request.command, request.path, request.headers)
        self.log.append((request.command, request.path, request.headers.get("Range", "")))
        if fault:
            self.done.append(fault)
        if isinstance(fault, int):
            request.close_connection = True
            request.send_response(fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "flip-upload":
            body = flipped(body, 2)  # another bit than on the way back, which would undo it
        connection = http.client.HTTPConnection(self._target, timeout=60)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        connection.request(request.command, request.path, body or None, headers)
        answer = connection.getresponse()
        content = answer.read()
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in (*HOP, "content-length", "date", "server"):
                request.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if request.command == "HEAD" else str(len(content))
        request.send_header("Content-Length", length)
        request.end_headers()
        if fault == "cut":
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
        elif request.command != "HEAD":
            request.wfile.write(flipped(content) if fault == "flip" else content)
        connection.close()

    @staticmethod
    def _body(request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.send_response_only(100)
            request.end_headers()
        if "chunked" in request.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(request.rfile.readline().split(b";")[0], 16):
                parts.append(request.rfile.read(size))
                request.rfile.readline()
            request.rfile.readline()
            return b"".join(parts)
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))


HOP = ("connection", "keep-alive", "transfer-encoding", "expect", "host")


def flipped(content: bytes, bit: int = 1) -> bytes:
    """`content` with one bit of its middle byte changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ bit]) + content[middle + 1 :] if content else content
