"""metrics.jsonl: complete after a kill, rewound on resume."""

import json

import pytest

from spikescale.errors import UserError
from spikescale.tracking.metrics_file import MetricsFile, read_metrics


def test_records_come_back_and_numbers_that_are_none_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write({"step": 1, "loss": 2.5})
    metrics.write({"step": 2, "loss": float("nan")})
    metrics.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]


def test_resume_drops_what_lies_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    metrics = MetricsFile(path, resume_step=3)
    metrics.write({"step": 4})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_damage_in_the_middle_is_an_error_naming_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2"):
        read_metrics(path)
