"""The README's table of what there is."""

from collections import Counter
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_capability_stands_once_and_its_page_is_there():
    rows = [
        line.split(" | ") for line in README.read_text(encoding="utf-8").splitlines() if "](docs/" in line
    ]
    rows = [cells for cells in rows if cells[0].startswith("| ")]
    assert len(rows) > 20
    counts = Counter(cells[0] for cells in rows)
    assert [name for name, count in counts.items() if count > 1] == []
    for cells in rows:
        page = cells[-1].rsplit("(", 1)[1].split(")")[0].split("#")[0]
        assert (README.parent / page).is_file(), page
