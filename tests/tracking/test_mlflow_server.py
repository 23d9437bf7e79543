"""An MLflow server over HTTP: it comes up late, goes away, says 500, and still gets everything it can."""

import http.server
import json
import logging
import socket
import threading
import time

import pytest

from spikescale.tracking.mlflow_run import MlflowRun

pytestmark = pytest.mark.slow


INFO = {
    "run_id": "abc",
    "run_uuid": "abc",
    "experiment_id": "1",
    "status": "RUNNING",
    "artifact_uri": "file:///nowhere",
    "lifecycle_stage": "active",
    "start_time": 1,
}


class Server:
    """The few endpoints of MLflow's REST interface that a run uses, with the records they were sent."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.metrics, self.ended, self.poisoned = [], [], set()
        self._http = None

    def up(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(*server.get(self.path.partition("?")[0]))

            def do_POST(self):
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*server.post(self.path, sent))

            def answer(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                pass

        http.server.ThreadingHTTPServer.allow_reuse_address = True
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def down(self):
        self._http.shutdown()
        self._http.server_close()

    def get(self, path):
        if path == "/health":
            return 200, {}
        if path.endswith("/experiments/get-by-name"):
            experiment = {"experiment_id": "1", "name": "tests", "lifecycle_stage": "active"}
            return 200, {"experiment": experiment}
        if path.endswith("/runs/get"):
            return 200, {"run": {"info": INFO, "data": {}}}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}

    def post(self, path, sent):
        if path.endswith("/runs/create"):
            return 200, {"run": {"info": INFO, "data": {}}}
        if path.endswith("/runs/update"):
            self.ended.append(sent["status"])
            return 200, {"run_info": INFO}
        if path.endswith("/runs/log-batch"):
            (metric,) = sent["metrics"]
            if metric["step"] in self.poisoned:
                return 500, {"error_code": "INTERNAL_ERROR", "message": "server bug"}
            self.metrics.append((metric["step"], metric["value"]))
            return 200, {}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count(caplog, words):
    return len([record for record in caplog.records if words in record.message])


def test_a_server_that_comes_late_and_goes_away_gets_everything(caplog):
    caplog.set_level(logging.DEBUG)
    server = Server()
    run = MlflowRun(server.uri, "tests", "late", retry_seconds=0.1)
    run.log_metrics({"loss": 1.0}, step=1)
    until(lambda: count(caplog, "does not answer"))
    server.up()
    until(lambda: server.metrics == [(1, 1.0)])
    assert run.run_id == "abc"
    server.down()
    run.log_metrics({"loss": 2.0}, step=2)
    run.log_metrics({"loss": 3.0}, step=3)
    until(lambda: count(caplog, "does not answer") == 2)
    server.up()
    assert run.finish("KILLED", seconds=120)
    assert server.metrics == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert server.ended == ["KILLED"]
    assert count(caplog, "is back") == 2
    assert count(caplog, "Retrying") == 0
    server.down()


def test_a_record_that_the_server_always_fails_on_does_not_stop_the_others(caplog):
    server = Server()
    server.poisoned = {1}
    server.up()
    run = MlflowRun(server.uri, "tests", "poison", retry_seconds=0.02)
    for step in (1, 2, 3):
        run.log_metrics({"loss": float(step)}, step=step)
    until(lambda: len(server.metrics) == 2)
    assert not run.finish(seconds=120)
    assert sorted(server.metrics) == [(2, 2.0), (3, 3.0)]
    assert server.ended == ["FINISHED"]
    assert "1 records did not arrive" in caplog.text
    assert "too many 500 error responses" in caplog.text
    server.down()
