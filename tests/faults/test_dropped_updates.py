"""A dropped update leaves no trace in weights, moments and the optimizer's count, at every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.distributed
def test_training_goes_on_as_if_the_step_had_not_been(tmp_path):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    script = str(Path(__file__).parent / "dropped_updates.py")
    command = [torchrun, "--standalone", "--nproc-per-node=2", script, str(tmp_path / "results.json")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]  # torchrun adds its own to the end
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 18
    wrong = {key: found for key, found in results.items() if found != [True, True, True]}
    assert not wrong  # (dropped, losses as without the batch, Adam's count as without it)
