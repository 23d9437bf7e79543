"""What preparing data costs, beside the same by other means; and how fast prepared data are read.

    python benchmarks/data.py                    # preparing, and reading 1e9 tokens
    python benchmarks/data.py --parts reading

Preparing: JSON lines of built-in corpora to GPT-2 tokens, a whole process each time, on two texts: the
corpora once, and several times over (--copies; so large that what Ray's processes do beside the work weighs
little). Cost is the machine's CPU time, all processes included, so the machine
must be idle otherwise. The difference of the two gives the cost of one more token, the rest is fixed:
starting Python, Ray, and importing. Every row must write the same number of tokens, else nothing is reported.

Reading: batches of a synthetic data set as one rank gets them, from memory mapped files, with the time to the
first batch and the memory at points along an epoch.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, positive, resident_bytes, show, write_results
from data_peers import PEERS

from spikescale.errors import UserError

HERE = Path(__file__).parent
SOURCES = ("gcide", "linux-docs", "python-docs")
OURS = ("spikescale, one process", "spikescale, Ray, 1 worker", "spikescale, Ray, 2 workers")
LIMIT = "plain loop (the limit)"
ROWS = (*PEERS, *OURS)
TICKS = os.sysconf("SC_CLK_TCK")
SHARD_TOKENS = 16_000_000


def cpu_seconds() -> float:
    """CPU time of all processes of this machine since it started, without waiting and idling."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system = (int(field) for field in fields[:3])
    return (user + nice + system) / TICKS


def write_corpora(folder: Path, sources: list[str], copies: int) -> dict[str, Path]:
    """JSON lines of the corpora: once, and so many times."""
    from spikescale.data_pipeline.sources import open_source

    paths = {"small": folder / "small.jsonl", "large": folder / "large.jsonl"}
    with paths["small"].open("w", encoding="utf-8") as once:
        for name in sources:
            for partition in open_source([name]).partitions():
                for document in partition.documents():
                    once.write(json.dumps({"text": document.text}) + "\n")
    with paths["large"].open("wb") as often:
        for _ in range(copies):
            with paths["small"].open("rb") as once_more:
                shutil.copyfileobj(once_more, often)
    return paths


def save_tokenizer(folder: Path, spec: str) -> None:
    """The tokenizer that every row uses."""
    from spikescale.data_pipeline.tokenizers import make_tokenizer, parse_spec

    make_tokenizer(parse_spec(spec)).save(folder)


def commands(texts: Path, tokenizer: Path, spec: str, output: Path) -> dict[str, list[str]]:
    """The rows, as commands that write to `output`."""
    program = str(Path(sys.executable).parent / "spikescale")
    prepare = [program, "data", "prepare", "--source", str(texts)]
    prepare += ["--tokenizer", spec, "--quiet", "--valid-fraction", "0"]
    prepare += ["--test-fraction", "0", "--output", str(output / "data")]
    how = (["--no-ray"], ["--workers", "1"], ["--workers", "2"])
    rows = {name: [*prepare, *words] for name, words in zip(OURS, how, strict=True)}
    peer = [sys.executable, str(HERE / "data_peers.py")]
    return {name: [*peer, name, str(texts), str(tokenizer), str(output)] for name in PEERS} | rows


def tokens_of(name: str, answer: str, output: Path) -> int:
    """How many tokens a finished command wrote."""
    if name in PEERS:
        return int(answer.split()[-1])
    from spikescale.data_pipeline.manifest import load_manifest

    return load_manifest(output / "data", verify="full").totals("train").tokens


def run_once(name: str, texts: Path, tokenizer: Path, spec: str, folder: Path) -> tuple[float, float, int]:
    """(CPU seconds, seconds, tokens) of one whole command."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    command = commands(texts, tokenizer, spec, output)[name]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, began = cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds, spent = time.perf_counter() - began, cpu_seconds() - before
    if done.returncode:
        raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}")
    return spent, seconds, tokens_of(name, done.stdout, output)


def preparing(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of the first table."""
    texts, tokenizer = write_corpora(folder, options.sources, options.copies), folder / "tokenizer"
    save_tokenizer(tokenizer, options.tokenizer)
    names = [LIMIT, *(row for row in options.rows if row != LIMIT)]
    runs: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for _ in range(options.repeats):
        for name in names:
            for size, path in texts.items():
                print(f"\r{name}, {size} corpus ...".ljust(70), end="", file=sys.stderr, flush=True)
                runs.setdefault((name, size), []).append(
                    run_once(name, path, tokenizer, options.tokenizer, folder)
                )
    print(file=sys.stderr)
    counted = {size: {run[2] for name in names for run in runs[name, size]} for size in texts}
    if any(len(counts) != 1 for counts in counted.values()):
        raise UserError(f"the rows wrote different numbers of tokens: {counted}")
    tokens = {size: counts.pop() for size, counts in counted.items()}
    more = tokens["large"] - tokens["small"]
    rows = []
    limits: list[float] = []  # the slopes of the first row
    for name in names:
        small, large = ([run[0] for run in runs[name, size]] for size in ("small", "large"))
        slopes = [(big - little) / more for little, big in zip(small, large, strict=True)]
        slope, limits = statistics.median(slopes), limits or slopes
        rows.append(
            {
                "name": name,
                "tokens": tokens["large"],
                "cpu_seconds": statistics.median(large),
                "seconds": statistics.median(run[1] for run in runs[name, "large"]),
                "tokens_per_cpu_second": tokens["large"] / statistics.median(large),
                "marginal_cpu_seconds_per_million": slope * 1e6,
                "marginal_range": [min(slopes) * 1e6, max(slopes) * 1e6],
                # Round by round: how fast the machine is changes between them more than within one.
                "of_the_limit": statistics.median(a / b for a, b in zip(slopes, limits, strict=True)),
                "fixed_cpu_seconds": statistics.median(small) - slope * tokens["small"],
            }
        )
    return rows


def show_preparing(rows: list[dict[str, Any]]) -> None:
    """Print the first table."""
    columns = [
        "",
        "s",
        "CPU s",
        "tokens / CPU s",
        "CPU s a million more (range)",
        "x the limit",
        "fixed CPU s",
    ]
    shown = []
    for row in rows:
        low, high = row["marginal_range"]
        shown.append(
            [
                row["name"],
                f"{row['seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['tokens_per_cpu_second']:,.0f}",
                f"{row['marginal_cpu_seconds_per_million']:.3f} ({low:.3f} to {high:.3f})",
                f"{row['of_the_limit']:.2f}",
                f"{row['fixed_cpu_seconds']:.1f}",
            ]
        )
    show(f"Preparing {rows[0]['tokens'] / 1e6:.1f} million tokens of text", columns, shown)


def write_synthetic(folder: Path, tokens: int) -> None:
    """A prepared data set of random byte tokens in documents of 1,000."""
    from spikescale.data_pipeline.manifest import TOKENIZER_FOLDER, write_manifest
    from spikescale.data_pipeline.shards import ShardWriter, dtype_for
    from spikescale.data_pipeline.tokenizers import make_tokenizer, parse_spec

    tokenizer = make_tokenizer(parse_spec("byte"))
    tokenizer.save(folder / TOKENIZER_FOLDER)
    generator = np.random.default_rng(0)
    shards, count = [], -(-tokens // SHARD_TOKENS)
    for number in range(count):
        writer = ShardWriter(folder, "train", number, tokenizer.vocab_size, tokenizer.eos_id)
        length = min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)
        ids = generator.integers(tokenizer.eos_id, size=length, dtype=np.uint8).astype(np.int64)
        for begin in range(0, length, 1_000_000):
            part = ids[begin : begin + 999_999]
            writer.add(part, len(part), len(part), f"synthetic {number}")
        shards.append(writer.finish())
        print(f"\rwriting shard {number + 1} of {count} ...", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    write_manifest(folder, tokenizer, dtype_for(tokenizer.vocab_size), shards, count, "synthetic")


READER = """
import json, sys, time
began = time.perf_counter()
from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.stream import Loader, TokenStream
folder, steps, points, length, batch = sys.argv[1], *(int(word) for word in sys.argv[2:])
imported = time.perf_counter()
manifest = load_manifest(folder, verify="size")
stream = TokenStream(manifest, "train", length)
loader = Loader(stream, batch)
start_state = loader.state_dict()
next(loader)
first = time.perf_counter()
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]
rates, held = [], []
for point in range(points):
    loader.close()
    # Far along the epoch each time: whatever grows with the position would show.
    samples = stream.samples_per_epoch * point // points // batch * batch
    loader.load_state_dict({**start_state, "samples": samples})
    next(loader)
    start = time.perf_counter()
    for _ in range(steps):
        next(loader)
    rates.append(steps * batch * length / (time.perf_counter() - start))
    held.append(memory())
print(json.dumps({"import": imported - began, "start": first - imported, "rates": rates, "memory": held}))
loader.close()
"""


def reading(tokens: int, folder: Path, steps: int, points: int) -> dict[str, Any]:
    """The figures of one process that reads, and the limit: copying as many bytes."""
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_synthetic(folder, tokens)
    command = [sys.executable, "-c", READER, str(folder), str(steps), str(points), "1024", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"reading: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    # The least that must be done: widen two bytes a token to eight.
    source = np.zeros(32 * 1025, dtype=np.uint16)
    target = np.empty(source.shape, dtype=np.int64)
    began = time.perf_counter()
    for _ in range(2000):
        target[:] = source
    found["limit"] = 2000 * 32 * 1024 / (time.perf_counter() - began)
    found["tokens"] = tokens
    return found


def show_reading(found: dict[str, Any]) -> None:
    """Print the second table."""
    rates = sorted(found["rates"])
    anonymous = [memory[0] / 2**20 for memory in found["memory"]]
    mapped = [memory[1] / 2**20 for memory in found["memory"]]
    rows = [
        ["tokens of the data set", f"{found['tokens']:,}"],
        ["seconds to the first batch (after imports)", f"{found['start']:.2f}"],
        ["seconds of imports", f"{found['import']:.2f}"],
        ["Mtok/s of one rank: median (range)", f"{statistics.median(rates) / 1e6:.1f}"
         f" ({rates[0] / 1e6:.1f} to {rates[-1] / 1e6:.1f})"],
        ["Mtok/s of widening alone, no reading", f"{found['limit'] / 1e6:.0f}"],
        ["own memory along an epoch, MiB", f"{min(anonymous):.0f} to {max(anonymous):.0f}"],
        ["mapped files in memory, MiB", f"{min(mapped):.0f} to {max(mapped):.0f}"],
    ]  # fmt: skip
    show("Reading, T 1024, batches of 32", ["", ""], rows)


def main() -> None:
    parser = arguments(__doc__ or "", "data")
    parser.set_defaults(repeats=5)
    parser.add_argument(
        "--parts", nargs="+", choices=("preparing", "reading"), default=["preparing", "reading"]
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the first table")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), metavar="NAME|PATH", help="of text")
    parser.add_argument(
        "--copies", type=positive, default=12, metavar="N", help="of the text in the larger corpus, from 2 on"
    )
    parser.add_argument("--tokenizer", default="gpt2", metavar="SPEC", help="as for `data prepare`")
    parser.add_argument("--steps", type=positive, default=300, help="batches read at each point")
    parser.add_argument("--tokens", type=positive, default=1_000_000_000, help="of the data set that is read")
    parser.add_argument("--folder", type=Path, help="keep and reuse the data set that is read here")
    options = parser.parse_args()
    if options.copies < 2:
        parser.error(f"--copies {options.copies}: from 2 on")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "preparing" in options.parts:
            results["preparing"] = preparing(options, folder)
            show_preparing(results["preparing"])
        if "reading" in options.parts:
            place = options.folder or folder / "synthetic"
            results["reading"] = reading(options.tokens, place, options.steps, points=20)
            show_reading(results["reading"])
    results["resident_mib"] = resident_bytes() / 2**20
    write_results(results, options.output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
