#!/usr/bin/env python3
"""A run that is killed again and again against the same run left alone: what is lost, how soon it is back.

    python benchmarks/soak.py --minutes 30 --ranks 2

Two runs on the same small corpus, with the same batches whose loss is no number. The first is left alone. The
second runs under `launch/pretrain.py --max-restarts`, and a seeded generator ends a rank, ends rank 0 in the
middle of a save, freezes a rank until the watchdogs bite, or ends the supervisor, which is then started
anew. It says how many steps each fault cost, how long until training was where it had been, and whether the
curves are equal.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import positive, show, write_results

from spikescale.errors import UserError
from spikescale.faults.events import read_events

ROOT = Path(__file__).parents[1]
KINDS = ("kill a rank", "kill rank 0 in a save", "freeze a rank", "kill the supervisor")
WEIGHTS = (3, 2, 1, 1)  # how often each comes
HANG_SECONDS = 10.0
SPEED = ("tokens_per_second", "flops_per_second", "peak_share", "data_wait_share")
PROCESS = ("dead_neurons", "saturated_neurons")  # over the last logged steps of one process
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Strike:
    """One fault and what came of it. Seconds count from the fault."""

    kind: str
    at_second: float  # of the disturbed run
    step: int  # the last one recorded before it
    resumed_from: int = 0
    seconds_to_training: float = 0.0  # until a step ended again
    seconds_to_step: float = 0.0  # until training was past the step again

    @property
    def lost(self) -> int:
        """Steps to be done again."""
        return max(0, self.step - self.resumed_from)


class Disturbed:
    """The supervised run, and its faults."""

    def __init__(self, words: list[str], folder: Path, ranks: int, seed: int, mean_seconds: float) -> None:
        self.words, self.folder, self.ranks = words, folder, ranks
        self.draw, self.mean_seconds = random.Random(seed), mean_seconds
        self.strikes: list[Strike] = []
        self.deck: list[str] = []
        self.supervisors = 1
        self.began = time.monotonic()
        self.process = start(words)

    def run(self) -> float:
        """To the end, however often it is interrupted; the seconds it took."""
        due = self._next()
        self._wait_for_step(0)
        while self.process.poll() is None:
            if time.monotonic() >= due:
                self._strike(self._kind())
                due = self._next()
            time.sleep(0.02)
        if self.process.returncode != 0:
            raise UserError(f"{self.folder}: the disturbed run ended with code {self.process.returncode}")
        return time.monotonic() - self.began

    def _kind(self) -> str:
        # Dealt from a shuffled deck, so that a short run meets every kind too.
        if not self.deck:
            self.deck = [kind for kind, weight in zip(KINDS, WEIGHTS, strict=True) for _ in range(weight)]
            self.draw.shuffle(self.deck)
        return self.deck.pop()

    def _next(self) -> float:
        return time.monotonic() + self.draw.expovariate(1 / self.mean_seconds)

    def _strike(self, kind: str) -> None:
        victims = ranks_of(self.process.pid)
        if len(victims) < self.ranks:
            return  # it has ended, or is about to be started again
        victim = victims[0] if kind == "kill rank 0 in a save" else self.draw.choice(victims)
        if kind == "kill rank 0 in a save" and not self._wait_for_save():
            return
        starts = len(self._starts())
        strike = Strike(kind, time.monotonic() - self.began, last_step(self.folder))
        struck = time.monotonic()
        try:
            if kind == "kill the supervisor":
                self.process.kill()
                self.process.wait()
                while any(is_alive(rank) for rank in victims):
                    time.sleep(0.02)
                # What the ranks still did before they noticed is saved, not lost.
                self.process = start(self.words)
                self.supervisors += 1
            else:
                os.kill(victim, signal.SIGSTOP if kind == "freeze a rank" else signal.SIGKILL)
        except ProcessLookupError:
            return
        while len(self._starts()) == starts:
            if self.process.poll() is not None:
                return  # the run was over before the fault could do anything
            time.sleep(0.02)
        strike.resumed_from = int(self._starts()[-1]["step"])
        self._wait_for_step(strike.resumed_from)
        strike.seconds_to_training = time.monotonic() - struck
        self._wait_for_step(strike.step)
        strike.seconds_to_step = time.monotonic() - struck
        self.strikes.append(strike)

    def _starts(self) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder) if event["event"] == "start"]

    def _wait_for_step(self, step: int) -> None:
        while last_step(self.folder) <= step and self.process.poll() is None:
            time.sleep(0.02)

    def _wait_for_save(self) -> bool:
        checkpoints = self.folder / "checkpoints"
        while self.process.poll() is None:
            if any(checkpoints.glob(".tmp-step-*/*")):
                return True
            time.sleep(0.001)
        return False


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """Start launch/pretrain.py; its lines go to a file in the working directory's place."""
    environment = {name: value for name, value in os.environ.items() if name not in PLACES}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *words]
    log = Path(words[words.index("--config") + 1]).with_suffix(".log")
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl has; 0 before the first."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def status(process: int) -> list[str]:
    """The fields of /proc/PID/stat after the command: state, parent, ...; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    found = status(process)
    return bool(found) and found[0] != "Z"


def ranks_of(supervisor: int) -> list[int]:
    """The process ids of a supervisor's ranks, in the order of their start."""
    ids = sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in ids if (found := status(pid)) and found[0] != "Z" and int(found[1]) == supervisor]


def write_run_file(folder: Path, steps: int, nan: str) -> Path:
    """A run of a small model on a small corpus, made in `folder`."""
    from spikescale.data_pipeline.prepare import PrepareSettings, prepare
    from spikescale.data_pipeline.sources import open_source

    if not (folder / "prepared").exists():
        text = folder / "text"
        text.mkdir()
        draw = random.Random(7)
        words = [
            "the",
            "quick",
            "brown",
            "fox",
            "spikes",
            "over",
            "a",
            "lazy",
            "neuron",
            "and",
            "fires",
            "again",
        ]
        for number in range(200):
            sentences = (" ".join(draw.choices(words, k=draw.randint(4, 12))) + "." for _ in range(60))
            (text / f"{number:03d}.txt").write_text("\n".join(sentences), encoding="utf-8")
        source = open_source([str(text)], partition_bytes=50_000)
        settings = PrepareSettings(ray=False, quiet=True)
        prepare(source, folder / "prepared", settings)
    content = {
        "output": str(folder / "runs"),
        "data": {"path": str(folder / "prepared")},
        "model": {"layers": 2, "width": 64, "context_length": 128, "dropout": 0.1},
        "train": {
            "steps": steps,
            "batch_size": 16,
            "micro_batch_size": 4,
            "warmup_steps": min(20, steps),
            "log_every": 1,
            "evaluate_every": 0,
            "evaluate_tokens": 2000,
            "final_evaluation_tokens": 2000,
            "save_every": 50,
            "sample_count": 0,
            "threads": 1,
        },
        "zero": {"stage": 1},
        "faults": {"inject": nan, "hang_seconds": HANG_SECONDS},
        "mlflow": {"enabled": False},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def timed(words: list[str]) -> float:
    """Run to the end; the seconds it took."""
    began = time.monotonic()
    process = start(words)
    if process.wait() != 0:
        raise UserError(f"{' '.join(words)}: ended with code {process.returncode}")
    return time.monotonic() - began


def comparable(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the machine's speed or on one process."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    hidden = (*SPEED, *PROCESS)
    return [{key: v for key, v in json.loads(line).items() if key not in hidden} for line in lines]


def spread(values: list[float]) -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"


def draw_picture(path: Path, alone: list[dict[str, Any]], disturbed: Disturbed) -> None:
    """Both curves, and the faults along them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    for records, style, label in (
        (alone, {"linewidth": 4, "alpha": 0.35}, "left alone"),
        (comparable(disturbed.folder), {"linewidth": 1}, "disturbed"),
    ):
        known = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
        above.plot(*zip(*known, strict=True), label=label, **style)
    above.set(title="training loss", xlabel="step", ylabel="nats a token")
    above.legend()
    for index, kind in enumerate(KINDS):
        strikes = [strike for strike in disturbed.strikes if strike.kind == kind]
        places = [strike.at_second / 60 for strike in strikes]
        below.plot(places, [s.seconds_to_training for s in strikes], "o", color=f"C{index}", label=kind)
    below.set(title="until a step ended again", xlabel="minutes into the disturbed run", ylabel="seconds")
    below.set_ylim(0, None)
    below.legend(fontsize=8)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Both runs, the table, the JSON and the picture."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of both runs together, about")
    parser.add_argument("--ranks", type=positive, default=2, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument(
        "--every", type=float, default=30.0, metavar="SECONDS", help="mean time to the next fault"
    )
    parser.add_argument("--steps", type=positive, help="of each run (default: what fits into the minutes)")
    default = Path(__file__).parent / "results" / "soak.json"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help="where the JSON goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        soak(arguments, Path(place))


def soak(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure the speed, train twice, compare."""
    launch = ["--ranks", str(arguments.ranks), "--max-restarts", "100000"]
    file = write_run_file(folder, 40, "")
    words = [*launch, "--config", str(file)]
    steps = arguments.steps or _steps_that_fit(words, arguments.minutes * 60)
    # One batch alone, which is dropped, and a row that leads to a roll-back.
    row = steps // 2
    nan = f"nan@{steps // 4};nan@{row}-{row + 2}"
    write_run_file(folder, steps, nan)
    alone_seconds = timed([*words, "name=alone"])
    disturbed = Disturbed(
        [*words, "name=disturbed"],
        folder / "runs" / "disturbed",
        arguments.ranks,
        arguments.seed,
        arguments.every,
    )
    seconds = disturbed.run()
    alone, other = comparable(folder / "runs" / "alone"), comparable(disturbed.folder)
    equal = alone == other
    restarts = [event for event in read_events(disturbed.folder) if event["event"] == "restart"]
    rows = []
    for kind in (*KINDS, "all"):
        strikes = [strike for strike in disturbed.strikes if kind in (strike.kind, "all")]
        rows.append(
            [
                kind,
                str(len(strikes)),
                spread([float(strike.lost) for strike in strikes]),
                spread([strike.seconds_to_training for strike in strikes]),
                spread([strike.seconds_to_step for strike in strikes]),
            ]
        )
    columns = ["fault", "times", "steps lost", "seconds to training", "seconds to the same step"]
    show(f"{steps} steps on {arguments.ranks} ranks, a checkpoint every 50", columns, rows)
    lost = sum(strike.lost for strike in disturbed.strikes)
    killed = disturbed.supervisors - 1
    print(f"{alone_seconds:.0f} s left alone, {seconds:.0f} s disturbed")
    print(f"{len(restarts)} restarts by a supervisor, {killed} supervisors killed, {lost} steps done again")
    print(f"curves equal: {equal}")
    results = {
        "steps": steps,
        "ranks": arguments.ranks,
        "seed": arguments.seed,
        "injected": nan,
        "seconds_alone": alone_seconds,
        "seconds_disturbed": seconds,
        "restarts": len(restarts),
        "supervisors_killed": killed,
        "steps_lost": lost,
        "curves_equal": equal,
        "final_valid_losses": [records[-1].get("valid_loss") for records in (alone, other)],
        "strikes": [{**asdict(strike), "steps_lost": strike.lost} for strike in disturbed.strikes],
    }
    write_results(results, arguments.output)
    draw_picture(arguments.output.with_suffix(".png"), alone, disturbed)
    print(f"written: {arguments.output} and {arguments.output.with_suffix('.png')}")
    if not equal:
        different = sum(a != b for a, b in zip(alone, other, strict=False)) + abs(len(alone) - len(other))
        print(f"error: the curves differ in {different} records", file=sys.stderr)
        sys.exit(1)


def _steps_that_fit(words: list[str], seconds: float) -> int:
    """Steps for which the run left alone takes a third of the time; the other one has restarts beside."""
    short = timed([*words, "name=short"])
    long = timed([*words, "name=long", "train.steps=240"])
    rate = 200 / max(long - short, 0.5)
    return max(100, int((seconds / 3 - short) * rate))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
