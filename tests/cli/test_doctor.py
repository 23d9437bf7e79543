"""`spikescale doctor`: what is missing is named, with what to do, and decides the exit code."""

import json
import os
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest

from spikescale import doctor
from spikescale.cli.main import main
from spikescale.doctor import Check
from spikescale.kernels import self_check
from spikescale.kernels.build import instruction_sets


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_working_machine_passes_and_every_kernel_backend_was_run(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("Python", "torch", "CPU", "deepspeed", "ray", "mlflow", "megatron-core", "disk here"):
        assert checks[name]["status"] in ("ok", "note"), name
    operators = ("wkv", "lif", "token_mix", "activations", "layer_norm", "lif_norm", "spike_bits", "decode")
    for operator in operators:
        assert checks[f"kernel {operator} reference"]["status"] == "ok"
        for name in instruction_sets():
            assert checks[f"kernel {operator} cpu-{name}"]["status"] == "ok"


def test_a_kernel_with_a_wrong_output_or_gradient_is_not_to_be_trained_with(monkeypatch):
    run, results = self_check.run, {}

    def wrong_last(operator, backend, device):
        results[operator] = run(operator, backend, device)
        if backend != "reference":
            results[operator][-1] = results[operator][-1] + 1e-3
        return results[operator]

    monkeypatch.setattr(self_check, "run", wrong_last)
    for name, check in by_name(doctor._kernels()).items():
        if name.endswith("reference"):
            assert check.status == "ok", name
        else:
            assert (check.status, "model.backend=reference" in check.remedy) == ("missing", True), name
    # Outputs, and the gradients of four inputs.
    for operator in set(self_check.OPERATORS) - {"spike_bits", "decode"}:
        assert len(results[operator]) > 4, operator


def test_every_line_that_is_not_ok_says_what_to_do(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for line, following in pairwise(lines):
        if line.startswith(("missing ", "note ")):
            assert following.strip().startswith("-> ")


def test_a_required_package_that_is_missing_fails(monkeypatch, capsys):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "deepspeed" else version(name))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing  deepspeed" in out
    assert out.splitlines()[-1] == "missing and required: deepspeed"


def test_an_optional_package_that_is_missing_does_not(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "triton" else version(name))
    checks = doctor.examine()
    assert by_name(checks)["triton"].status == "note"
    assert not any(check.failed for check in checks)


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (check,) = doctor._compiler()
    assert (check.status, check.required) == ("missing", False)
    assert "g++" in check.remedy


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch):
    def broken() -> list[Check]:
        raise RuntimeError("no\nway")

    monkeypatch.setattr(doctor, "_disk", broken)
    checks = by_name(doctor.examine())
    assert checks["broken"].detail == "check failed: no way"
    assert "extension builds" in checks


def test_a_database_of_mlflow_is_opened_and_one_to_be_made_is_announced(tmp_path):
    database = tmp_path / "mlflow.db"
    check = doctor._mlflow_store(f"sqlite:///{database}")
    assert (check.status, check.detail) == ("ok", f"{database} will be made by the first run")
    assert not database.exists()
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE runs (id TEXT)")
        connection.execute("INSERT INTO runs VALUES ('a'), ('b')")
    connection.close()
    assert doctor._mlflow_store(f"sqlite:///{database}").detail == f"{database}, 2 runs"
    database.write_bytes(b"this is no database" * 100)
    check = doctor._mlflow_store(f"sqlite:///{database}")
    assert check.status == "missing"
    assert "not a database" in check.detail


def test_a_server_of_mlflow_is_asked_and_a_dead_one_is_no_failure(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    assert doctor._mlflow_store(uri + "/") == Check("MLflow store", "ok", f"{uri}/ answers 200")
    server.shutdown()
    server.server_close()
    check = doctor._mlflow_store(uri)
    assert check.status == "missing"
    assert not check.failed


@pytest.mark.parametrize("layout", ["cpu_adam/lock", "py311_cpu/cpu_adam/lock"])
def test_the_lock_of_a_killed_build_is_found_with_the_command_that_removes_it(tmp_path, layout):
    lock = tmp_path / layout
    lock.parent.mkdir(parents=True)
    lock.touch()
    (fresh,) = doctor.build_locks(tmp_path)
    assert (fresh.status, fresh.remedy) == ("note", "a build seems to be running")
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    (stale,) = doctor.build_locks(tmp_path)
    assert stale.status == "missing"
    assert stale.remedy.endswith(f"rm '{lock}'")


def test_no_lock_is_fine(tmp_path):
    (check,) = doctor.build_locks(tmp_path / "absent")
    assert check.status == "ok"
