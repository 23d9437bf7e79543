"""metrics.jsonl: one JSON object a line, in the order of the steps."""

import json
import math
from pathlib import Path
from typing import Any, TextIO

from spikescale.errors import UserError
from spikescale.files import write_text


class MetricsFile:
    """Appends one line for each record; a resumed run first drops what lies after its checkpoint.

    resume_step, rollbacks: how many steps, and roll-backs in the run's life, the checkpoint has seen.
    """

    def __init__(self, path: Path, resume_step: int = 0, rollbacks: int = 0) -> None:
        self.path = path
        self._file = self._cut(resume_step, rollbacks)

    def _cut(self, step: int, rollbacks: int) -> TextIO:
        there = read_metrics(self.path) if self.path.exists() else []
        # A roll-back is recorded at the step that it leads to.
        kept = [r for r in there if r["step"] <= step and r.get("rollback", 0) <= rollbacks]
        write_text(self.path, "".join(_line(record) for record in kept))
        return self.path.open("a", encoding="utf-8")

    def rewind(self, step: int, rollbacks: int) -> None:
        """Drop the records after `step`, and those of roll-backs after the first `rollbacks`."""
        self._file.close()
        self._file = self._cut(step, rollbacks)

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
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            # NaN and Infinity are no JSON, but other writers leave them: no number either.
            records.append(json.loads(line, parse_constant=lambda _: None))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: not a JSON record") from None
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    # JSON has no NaN or infinity: null says that there was no number.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
