"""A shard that vanishes under a run, and a launcher that ends: the run goes on when they are back."""

import os
import shutil
import signal
import time

import pytest
from processes import alive, children, end, events, records, start, until

from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.stream import TokenStream
from spikescale.errors import UserError
from spikescale.faults.launcher import POLL_SECONDS

BATCH, CONTEXT = 8, 32  # of the run file


def test_ids_and_sizes_of_a_shard_are_held_against_the_manifest_when_it_is_read(sharded_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(sharded_data, folder)
    manifest = load_manifest(folder)
    shard, _ = TokenStream(manifest, "train", CONTEXT).locate(0)
    whole = shard.path.read_bytes()
    width = manifest.dtype.itemsize
    for content, words in (
        (whole[:-width], "cannot be read as"),
        (whole + whole[:width], "cannot be read as"),
        (b"\xff" * len(whole), "the vocabulary ends at 255"),
    ):
        shard.path.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            TokenStream(manifest, "train", CONTEXT).rows(0, 1)
        assert shard.path.name in str(caught.value)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_whose_shard_vanishes_and_whose_launcher_is_ended_loses_nothing(runs, sharded_data, tmp_path):
    all_runs, _, file = runs
    data, folder = tmp_path / "data", all_runs / "lost"
    shutil.copytree(sharded_data, data)
    stream = TokenStream(load_manifest(data), "train", CONTEXT, shuffle_window=1)
    shards = [stream.locate(sample)[0].path for sample in range(9 * BATCH)]
    later = next(path for path in shards if path not in shards[: 6 * BATCH])
    batch = shards.index(later) // BATCH + 1  # the first that needs it; the loader is not there in step 2
    words = ["--config", str(file), f"data.path={data}", "name=lost"]

    process = start([*words, "faults.inject=pause@2"])
    until(lambda: (folder / "injected" / "pause@2-rank0").exists())
    later.rename(tmp_path / later.name)
    (folder / "continue").touch()
    code, _, err = end(process)
    assert code == 2
    assert err.count("error: ") == 1
    assert later.name in err
    assert f"the run goes on from step {batch - 1} when it is back" in err
    assert (folder / "checkpoints" / "latest").read_text().strip() == f"step-{batch - 1:08d}"
    (tmp_path / later.name).rename(later)

    # deepspeed that gets SIGTERM ends and leaves its helper and the rank behind.
    launcher = start([*words, f"faults.inject=pause@{batch + 1}"], "deepspeed")
    until(lambda: (folder / "injected" / f"pause@{batch + 1}-rank0").exists())
    left = [helper for helper in children(launcher.pid) if children(helper)]
    ranks = [rank for helper in left for rank in children(helper)]
    assert len(ranks) == 1
    os.kill(launcher.pid, signal.SIGTERM)
    until(lambda: launcher.poll() is not None or not alive(launcher.pid))
    time.sleep(3 * POLL_SECONDS)  # the rank looks after its launcher while it waits
    (folder / "continue").touch()
    until(lambda: not alive(ranks[0]))
    end(launcher)
    (stop,) = events(folder, "stop")
    assert (stop["step"], stop["saved"]) == (batch + 1, batch + 1)
    assert stop["reason"] == "the end of its launcher"
    whole = [record for record in records(all_runs / "whole") if record["step"] <= stop["step"]]
    assert records(folder) == whole
