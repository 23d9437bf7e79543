"""The planner still says what real processes took when `benchmarks/memory.py` was last run."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_measured_row_is_planned_within_a_tenth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "memory", raising=False)
    import memory

    rows = memory.earlier_rows(BENCHMARKS / "results" / "memory.json")
    assert len(rows) >= 25
    assert {row["stage"] for row in rows.values()} == {0, 1, 2, 3}
    for name, row in rows.items():
        assert row["ratio"] == pytest.approx(1, abs=memory.ATTENTION), name
