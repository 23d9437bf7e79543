"""events.jsonl: what happened to a run besides training, one JSON object a line, never cut or rewritten."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


def append_event(folder: Path, event: str, step: int | None = None, **facts: Any) -> None:
    """Append one event with its time (UTC). Several processes may write: a line is one write to the end."""
    record = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "step": step,
        "event": event,
        **{key: _finite(value) for key, value in facts.items()},
    }
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's folder, oldest first. A last line cut short by a kill is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def _finite(value: Any) -> Any:
    # JSON has neither NaN nor infinity; their names say more than null.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
