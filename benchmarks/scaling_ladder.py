#!/usr/bin/env python3
"""The ladder of docs/scaling.md: byte-level and BPE, spiking and not, the largest size predicted before it
runs.

    python benchmarks/scaling_ladder.py --folder ladder --minutes 9     # again and again: 75 while there is
    more to do

Each call goes on where the last one stopped: corpora, a sweep of the learning rate, for each tokenizer all
sizes but the largest, a prediction of the largest in benchmarks/results. Once that file is committed, and not
before, the largest runs; then points, fits and a report are written.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import positive

from spikescale.cli.main import main as spikescale
from spikescale.config import load_model_preset
from spikescale.errors import UserError
from spikescale.faults.exits import REQUEUE
from spikescale.files import read_json, write_json
from spikescale.scaling.ladder import Size
from spikescale.scaling.plan_file import read_plan

RESULTS = Path(__file__).resolve().parent / "results"
FAMILIES = "spikegpt,rwkv"
# Shards that are mixed with one another: all of them. With fewer, a short run reads the first corpora only.
SHUFFLE = "data.shuffle_window=64"
SWEEP = {
    "--sizes": "4x32,4x64,4x128",
    "--tokens": "0.3M",
    "--lrs": "2e-3,4e-3,8e-3,1.6e-2,3.2e-2",
    "--warmup-steps": "30",
    "--evaluate-tokens": "250000",
}


class Rungs(NamedTuple):
    """One ladder; the last of its sizes is the one that is predicted before it runs."""

    tokenizer: str
    corpora: tuple[str, ...]
    valid: str  # share held out
    sizes: str
    tokens: str
    most_flop: str  # of a run

    @property
    def largest(self) -> str:
        return self.sizes.split(",")[-1]


LADDERS = {
    "byte": Rungs(
        "byte",
        ("linux-docs", "python-docs", "sotu"),
        "0.006",
        "4x32,4x48,4x64,4x96,4x128,4x192,4x256",
        "0.25M,0.5M,1M,2M",
        "2.4e13",
    ),
    "bpe": Rungs(
        "sentencepiece:2048:bpe",
        ("python-docs", "sotu"),
        "0.02",
        "4x24,4x32,4x64,4x96,4x128,4x192,4x256",
        "0.25M,0.5M,1M,2M",
        "2.4e13",
    ),
}
FIG_3 = ("216m", "430m", "1b2")  # presets of the paper's figure, of 0.9G tokens each
LEAST_MINUTES = 0.7


class OverError(Exception):
    """The time is up, or the prediction waits for its commit."""


class Ladder:
    """The steps, each of which does nothing when it is done."""

    def __init__(self, minutes: float, workers: int, rounds: int, results: Path) -> None:
        self.end, self.workers, self.rounds = time.monotonic() + 60 * minutes, workers, rounds
        self.results = results

    def call(self, *words: str, codes: Sequence[int] = (0,)) -> int:
        """One spikescale command. Raises UserError for other codes than these."""
        code = spikescale(list(words))
        if code not in codes:
            raise UserError(f"spikescale {' '.join(words)}: ended with code {code}")
        return code

    def run(self, plan: Path, *only: str) -> None:
        """Runs of a plan, until the time is up."""
        left = (self.end - time.monotonic()) / 60
        if left < LEAST_MINUTES:
            raise OverError
        words = ["scaling", "run", str(plan), "--workers", str(self.workers), "--minutes", f"{left:.2f}"]
        if self.call(*words, *(["--only", *only] if only else []), codes=(0, REQUEUE)) == REQUEUE:
            raise OverError

    def data(self, name: str) -> Path:
        """The corpora of a ladder, cut into chunks that are held out here and there."""
        rungs = LADDERS[name]
        folder = Path("data") / f"docs-{name}"
        if not (folder / "manifest.json").exists():
            chunks = ["--split-unit", "chunk", "--chunk-characters", "4000", "--valid-fraction", rungs.valid]
            for index, corpus in enumerate(rungs.corpora):
                words = [
                    "data",
                    "prepare",
                    "--source",
                    corpus,
                    "--tokenizer",
                    rungs.tokenizer,
                    "--output",
                    str(folder),
                ]
                more = ["--append"] if index else []
                self.call(*words, *chunks, "--test-fraction", "0.004", "--no-ray", "--quiet", *more)
        return folder

    def plan(self, name: str, data: Path, design: str, settings: dict[str, str]) -> Path:
        """A plan file; one that is there stays."""
        path = Path(f"{name}.yaml")
        if not path.exists():
            words = [
                "scaling",
                "plan",
                "--data",
                str(data),
                "--name",
                name,
                "--design",
                design,
                "--runs",
                ".",
            ]
            options = [word for pair in settings.items() for word in pair]
            self.call(*words, "--variants", FAMILIES, "--output", str(path), *options, "--set", SHUFFLE)
        return path

    def rule(self) -> str:
        """The learning-rate rule of the sweep."""
        plan = self.plan("sweep-byte", self.data("byte"), "lr-sweep", SWEEP)
        if not Path("lr.json").exists():
            self.run(plan)
            self.call("scaling", "lr", "sweep-byte/points.csv", "--output", "lr.json")
        return "lr.json"

    def climb(self, name: str) -> None:
        """One ladder, to its report. Raises OverError."""
        rungs = LADDERS[name]
        settings = {"--sizes": rungs.sizes, "--tokens": rungs.tokens, "--max-flop": rungs.most_flop}
        settings |= {"--lr-rule": self.rule(), "--warmup-steps": "20"}
        data = self.data(name)
        plan = self.plan(f"ladder-{name}", data, "branches", {**settings, "--evaluate-tokens": "250000"})
        prediction = self.results / f"scaling-{name}-prediction.json"
        smaller = [f"*-{size}-*" for size in rungs.sizes.split(",")[:-1]]
        if not prediction.exists():
            self.run(plan, *smaller)
            self.predict(plan, rungs.largest, prediction)
        if not _committed(prediction):
            print(f"commit {prediction}: {rungs.largest} runs after that")
            raise OverError
        self.run(plan)
        self.publish(name, plan)

    def predict(self, plan: Path, largest: str, path: Path) -> None:
        """Write what the smaller sizes say of the largest."""
        runs = [run for run in read_plan(plan).runs if run.shape == largest and run.kind == "branch"]
        asked = sorted({f"{run.parameters}:{run.tokens}" for run in runs})
        self.call("scaling", "fit", *self.fitting(plan), "--predict", *asked, "--output", str(path))

    def fitting(self, plan: Path) -> list[str]:
        """Where a ladder's points are, and how they are fitted."""
        return [str(read_plan(plan).output / "points.csv"), "--rounds", str(self.rounds)]

    def publish(self, name: str, plan: Path) -> None:
        """Points, fits, the prediction beside what came, and the report."""
        points, fit = (self.results / f"scaling-{name}-{end}" for end in ("points.csv", "fit.json"))
        shutil.copyfile(read_plan(plan).output / "points.csv", points)
        asked = [f"{Size.of(load_model_preset(name, vocab_size=50277)).total}:0.9G" for name in FIG_3]
        self.call("scaling", "fit", *self.fitting(plan), "--predict", *asked, "--output", str(fit))
        content = read_json(fit)
        content["command"] = f"python benchmarks/scaling_ladder.py ({name})"
        write_json(fit, content)
        title = f"A small ladder, {name}: spikegpt and its twin"
        self.call(
            *("scaling", "report", "--plan", str(plan), "--output", f"report-{name}/report.html"),
            *("--rounds", str(self.rounds), "--title", title),
        )


def _committed(path: Path) -> bool:
    done = subprocess.run(
        ["git", "-C", str(path.parent), "status", "--porcelain", "--", path.name],
        capture_output=True,
        text=True,
    )
    known = subprocess.run(
        ["git", "-C", str(path.parent), "ls-files", "--error-unmatch", path.name], capture_output=True
    )
    return done.returncode == known.returncode == 0 and not done.stdout.strip()


def main() -> int:
    """Go on for some minutes; 75 while there is more to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("ladder"), help="for corpora and runs (default: ladder)"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e6, metavar="M", help="then save and end (default: no end)"
    )
    parser.add_argument(
        "--workers", type=positive, default=2, help="runs at a time, a thread each (default: 2)"
    )
    parser.add_argument("--rounds", type=positive, default=200, help="of the bootstrap (default: 200)")
    parser.add_argument(
        "--ladders", nargs="+", choices=tuple(LADDERS), default=list(LADDERS), help="(default: all)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="in a git work tree (default: benchmarks/results)"
    )
    arguments = parser.parse_args()
    results = arguments.results.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    ladder = Ladder(arguments.minutes, arguments.workers, arguments.rounds, results)
    over = False
    for name in arguments.ladders:
        try:
            ladder.climb(name)
        except OverError:
            over = True
    return REQUEUE if over else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
