"""Starting launch/pretrain.py as a real process, on a corpus and settings that take seconds."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TINY = {
    "model": {"layers": 2, "width": 32, "context_length": 32},
    "train": {
        "steps": 12,
        "batch_size": 8,
        "warmup_steps": 2,
        "lr": 5e-3,
        "min_lr": 1e-3,
        "log_every": 1,
        "evaluate_every": 6,
        "evaluate_tokens": 1000,
        "save_every": 6,
        "sample_tokens": 16,
        "sample_count": 1,
        "threads": 1,
    },
    "mlflow": {"enabled": False},
}


def write_corpus(folder: Path) -> None:
    """Sixty small documents of random sentences, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(7)
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
        "while",
        "membranes",
        "leak",
        "and",
        "fire",
        "again",
    ]
    for number in range(60):
        sentences = [" ".join(generator.choices(words, k=generator.randint(4, 12))) + "." for _ in range(20)]
        (folder / f"{number:02d}.txt").write_text("\n".join(sentences), encoding="utf-8")


def launch(
    words: list[str], launcher: str = "python", ranks: int = 1, timeout: int = 300, check: bool = True
):
    """Run launch/pretrain.py with `words` under a launcher; its CompletedProcess."""
    binaries = Path(sys.executable).parent
    command = launch_command(launcher, ranks)
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable, None)
    done = subprocess.run(
        command + words,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def launch_command(launcher: str, ranks: int, *torchrun_words: str) -> list[str]:
    """The words that start launch/pretrain.py on `ranks` ranks under python (one), deepspeed or torchrun."""
    binaries = Path(sys.executable).parent
    script = str(ROOT / "launch" / "pretrain.py")
    port = ["--master_port", str(free_port())] if launcher == "deepspeed" else []
    return {
        "python": [sys.executable, script],
        "deepspeed": [str(binaries / "deepspeed"), "--num_accelerators", str(ranks), *port, script],
        "torchrun": [
            str(binaries / "torchrun"),
            *("--standalone", f"--nproc-per-node={ranks}", *torchrun_words),
            script,
        ],
    }[launcher]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def losses(folder: Path) -> dict[int, float]:
    """The training loss at each step, as recorded."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}
