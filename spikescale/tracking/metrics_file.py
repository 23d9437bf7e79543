"""metrics.jsonl: one JSON object a line, in the order of the steps."""

import json
import math
from pathlib import Path
from typing import Any

from spikescale.errors import UserError
from spikescale.files import write_text


class MetricsFile:
    """Appends one line for each record; a resumed run first drops what lies after its checkpoint."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if path.exists() else []
        write_text(path, "".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`, which has at least a key `step`, and hand it to the operating system."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file. A last line cut short by a kill is left out; any other is an error."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a JSON record") from None
    return records


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN or infinity: null says that there was no number.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"
