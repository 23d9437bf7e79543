"""A checkpoint of any layout of ranks and any ZeRO stage continues in any other."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

from checkpoint_layouts import AFTER, GROUPS  # noqa: E402
from launching import free_port  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAYOUTS = {name: group for group, layouts in GROUPS.items() for name in layouts}
RANKS = {"one": 1, "two": 2, "tensor": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """What each engine found in each checkpoint, by (where it came from, where it went)."""
    folder = tmp_path_factory.mktemp("layouts")
    workers = []
    for group, ranks in RANKS.items():
        port = str(free_port())
        for rank in range(ranks):
            place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            environment |= {key: str(value) for key, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = (folder / f"{group}-{rank}.log").open("w")
            command = [sys.executable, str(HERE / "checkpoint_layouts.py"), str(folder), group]
            workers.append(
                (log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
            )
    try:
        # A worker that fails keeps the others waiting.
        while not (failed := [log for log, worker in workers if worker.poll()]):
            if all(worker.poll() == 0 for _, worker in workers):
                break
            time.sleep(0.1)
    finally:
        for log, worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            log.close()
    assert not failed, Path(failed[0].name).read_text()[-6000:]
    found = [entry for group in GROUPS for entry in json.loads((folder / f"{group}.results").read_text())]
    for group in GROUPS:
        for name in GROUPS[group]:
            (saved,) = (folder / name).glob("step-*")
            suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
            assert suffixes == {".json", ".safetensors"}, name  # nothing that would have to be unpickled
    return {(entry["source"], entry["target"]): entry for entry in found}


def test_every_checkpoint_was_loaded_into_every_layout(results):
    converted = {("converted", name) for name in GROUPS["one"]}
    assert results.keys() == set(itertools.product(LAYOUTS, repeat=2)) | converted


@pytest.mark.parametrize("what", ["weights", "moments", "step"])
def test_state_is_the_same_to_the_bit_in_every_layout(results, what):
    wrong = [pair for pair, entry in results.items() if not entry[what]]
    assert not wrong


def test_the_next_steps_are_the_same_in_every_layout(results):
    for pair, entry in results.items():
        assert len(entry["losses"]) == AFTER
        assert entry["losses"] == pytest.approx(entry["expected_losses"], abs=1e-5), pair


def test_in_the_same_layout_the_next_steps_are_the_same_to_the_bit(results):
    for name in LAYOUTS:
        entry = results[name, name]
        assert entry["losses"] == entry["expected_losses"], name


def test_random_generators_come_back_where_the_ranks_are_laid_out_alike_else_it_is_said(results):
    for (source, target), entry in results.items():
        alike = LAYOUTS.get(source) == LAYOUTS[target]
        assert entry["random"] == alike, (source, target)
        assert (entry["note"] is None) == alike
        if not alike:
            assert "random generators are seeded anew" in entry["note"]
