"""metrics.jsonl: complete after a kill, rewound on resume."""

import json

import pytest

from spikescale.errors import UserError
from spikescale.tracking.curves import plot_curves
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


def test_numbers_that_are_none_become_null_at_any_depth(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    inf = float("inf")
    metrics.write({"step": 1, "firing_rates": {"a": float("nan"), "b": 0.5}, "list": [1.0, -inf]})
    metrics.close()
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    expected = {"step": 1, "firing_rates": {"a": None, "b": 0.5}, "list": [1.0, None]}
    assert read_metrics(tmp_path / "m.jsonl") == [expected]


def test_nan_literals_and_odd_characters_are_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": NaN, "r": {"a": Infinity}}\n{"step": 2, "t": "\xe2\x80\xa8"}\n{"t": "\xe2'
    )
    assert read_metrics(path) == [
        {"step": 1, "loss": None, "r": {"a": None}},
        {"step": 2, "t": "\u2028"},
    ]


def test_curves_are_drawn_with_gaps_where_there_was_no_number(tmp_path):
    record = {"lr": 0.1, "tokens_per_second": 1e3, "gradient_norm": 1.0, "firing_rates": {"a": 0.5}}
    records = [
        {"step": 1, "loss": 3.0, **record},
        {"step": 2, "loss": None, **record},
        {"step": 3, "loss": 2.0, **record, "firing_rates": {"a": None}, "tokens_per_second": None},
        {"step": 3, "valid_loss": 2.0},
    ]
    assert plot_curves(records, tmp_path / "curves.png", "gaps")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert not plot_curves([{"step": 1, "loss": None}], tmp_path / "none.png", "nothing")
    assert not (tmp_path / "none.png").exists()
