"""Pretraining runs with context parallelism, one after another in the same processes.

    torchrun --standalone --nproc-per-node 2 context_training.py run.yaml "name=a zero.stage=0" "name=b"

One start of torch and DeepSpeed serves all of them; each is what launch/pretrain.py does with those settings.
"""

import faulthandler
import signal
import sys
from pathlib import Path

from spikescale.config import load_config
from spikescale.training.bootstrap import join_processes, leave_processes, prepare_process
from spikescale.training.ending import end_process
from spikescale.training.pretrain import pretrain

SECONDS = 120  # after which a worker that hangs ends itself


def main(run_file: Path, runs: list[str]) -> None:
    """Train every run to its end."""
    faulthandler.register(signal.SIGALRM, chain=True)  # says where it hangs, then ends
    signal.alarm(SECONDS)
    process = prepare_process()
    join_processes(process)
    for settings in runs:
        pretrain(load_config(run_file, settings.split()), process)
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    end_process(0)
