"""A plan as SLURM job arrays: one of what can start at once, one of the branches, which waits for it."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from spikescale.errors import UserError
from spikescale.files import write_text
from spikescale.scaling.plan_file import Plan, PlannedRun

SUBMIT = "submit.sh"
CONFIG = "base.yaml"

SCRIPT = """#!/usr/bin/env bash
# Submits the runs of the scaling plan {name} that are open. Written by `spikescale scaling run --slurm`.
# Words given to this script go to sbatch, such as --partition=gpu --time=2:00:00 --cpus-per-task=8.
# When all have ended: spikescale scaling run PLAN --collect
set -euo pipefail
cd "${{PROJECT:-{project}}}"
{arrays}
"""


def write_config(plan: Plan, path: Path) -> Path:
    """Write the run file that all runs of the plan share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(plan.base, sort_keys=False))
    return path


def write_arrays(
    plan: Plan, runs: Sequence[PlannedRun], folder: Path, at_once: int, gpus: bool, extra: Sequence[str] = ()
) -> Path:
    """Write the settings of each array element and the script that submits them; the script.

    at_once: elements of an array that may run together. gpus: whether a rank takes a GPU. Runs of several
    ranks have arrays of their own, by their number. Raises UserError without runs.
    """
    if not runs:
        raise UserError(f"{plan.name}: nothing is open: no array is written")
    config = write_config(plan, folder / CONFIG)
    lines = []
    first = [run for run in runs if run.branch_from is None]
    after = [run for run in runs if run.branch_from is not None]
    for stage, members in enumerate((first, after), 1):
        for ranks in sorted({run.ranks for run in members}):
            chosen = [run for run in members if run.ranks == ranks]
            file = folder / f"stage-{stage}-ranks-{ranks}.txt"
            content = "".join(" ".join([*plan.settings(run), *extra]) + "\n" for run in chosen)
            write_text(file, content)
            lines.append(_submit(stage, ranks, len(chosen), file, config, at_once, gpus, bool(first)))
    script = folder / SUBMIT
    write_text(script, SCRIPT.format(name=plan.name, project=Path.cwd(), arrays="\n".join(lines)))
    script.chmod(0o755)
    subprocess.run(["bash", "-n", str(script)], check=True, stdin=subprocess.DEVNULL, stderr=sys.stderr)
    return script


def _submit(
    stage: int, ranks: int, count: int, file: Path, config: Path, at_once: int, gpus: bool, waits: bool
) -> str:
    words = ["sbatch", "--parsable", f"--array=1-{count}%{at_once}", f"--ntasks-per-node={ranks}"]
    if gpus:
        words.append(f"--gpus-per-node={ranks}")
    command = " ".join(map(shlex.quote, words)) + ' "$@"'
    if stage == 2 and waits:
        # One that failed has branches that cannot start; they end with code 2 and say so.
        command += ' --dependency="afterany$first"'
    command += f" launch/slurm/sweep.sbatch {shlex.quote(str(file))} --config {shlex.quote(str(config))}"
    if stage == 1:
        return f'job=$({command})\necho "submitted $job"\nfirst="${{first:-}}:$job"'
    return f'job=$({command})\necho "submitted $job"'
