"""Pretraining runs one after another in one process; what each came to goes to a JSON file.

    python runs_in_turn.py run.yaml ends.json "name=a faults.inject=nan@5" "name=b ..."

One start of torch and DeepSpeed serves all; each is what launch/pretrain.py does with those settings.
"""

import json
import sys
from pathlib import Path

from spikescale.config import load_config
from spikescale.errors import UserError
from spikescale.training.bootstrap import join_processes, leave_processes, prepare_process
from spikescale.training.ending import end_process
from spikescale.training.pretrain import pretrain


def main(run_file: Path, ends: Path, runs: list[str]) -> None:
    """Train every run to its end; an error's message is its end."""
    process = prepare_process()
    join_processes(process)
    messages = []
    for settings in runs:
        try:
            pretrain(load_config(run_file, settings.split()), process)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    leave_processes()
    ends.write_text(json.dumps(messages), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    end_process(0)
